"""Recording attention, the scale experiment, and the figures of `timm-sknet attention`."""

import copy
import csv
import io
import math
import multiprocessing
import xml.etree.ElementTree

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.layers import SelectiveKernel
from timm.utils import reparameterize_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from timm_sknet import SelectiveKernelConv, attention
from timm_sknet.attention import EnlargedImages, record, scale_experiment, table
from timm_sknet.attention.figures import draw_classes
from timm_sknet.cli import main

M2 = [[3, 1, 4], [3, 2, 4]]


def alive(model):
    """Initialises a model so that its attention is far from 1/M and its batch norm statistics differ."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=2 / m.weight[0].numel() ** 0.5)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def by_hand(layer, x):
    """Computes the attention of our layer or of timm's, (B, M, C), without its forward pass."""
    branches, attn = (layer.branches if isinstance(layer, SelectiveKernelConv) else layer.paths), layer.attn
    conv = torch.nn.functional.conv2d

    def norm(c, bn):
        return torch.nn.functional.batch_norm(c, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps).relu()

    U = [
        norm(conv(x, b.conv.weight, None, b.conv.stride, b.conv.padding, b.conv.dilation, b.conv.groups), b.bn)
        for b in branches
    ]
    s = sum(U).mean((2, 3), keepdim=True)
    ours = isinstance(layer, SelectiveKernelConv)
    z = norm(conv(s, (attn.fc1 if ours else attn.fc_reduce).weight), attn.bn)
    logits = conv(z, (attn.fc2 if ours else attn.fc_select).weight).reshape(len(x), len(U), -1)
    return logits.exp() / logits.exp().sum(1, keepdim=True)


LAYERS = {
    'ours': lambda: SelectiveKernelConv(8, 16, branches=M2),
    'ours with three branches': lambda: SelectiveKernelConv(8, 16, branches=[*M2, [5, 1, 1]], stride=2),
    'timm': lambda: SelectiveKernel(8, 16, split_input=False),
}


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('name', LAYERS)
def test_statistics_agree_with_attention_computed_by_hand(name, folded):
    layer = alive(nn.Sequential(LAYERS[name]())).double()
    batches = [torch.randn(B, 8, 9, 7, dtype=torch.float64) for B in (3, 1, 4)]
    a = torch.cat([by_hand(layer[0], x) for x in batches])
    assert (a.amax(1) - a.amin(1)).mean() > 0.1
    model = reparameterize_model(layer) if folded else layer
    with torch.no_grad(), record(model) as units:
        for x in batches:
            model(x)
    (unit,) = units.values()
    assert unit.count == 8 and unit.path == '0'
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unit.last, a[4:], **close)
    torch.testing.assert_close(unit.mean, a.mean(0), **close)
    torch.testing.assert_close(unit.std, a.std(0, correction=0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unit.mean.sum(0), torch.ones(16, dtype=torch.float64), **close)
    extents = [3, 5] if a.shape[1] == 2 else [3, 5, 5]
    assert unit.extents == extents
    torch.testing.assert_close(unit.extent, sum(e * a[:, i].mean(0) for i, e in enumerate(extents)), **close)
    torch.testing.assert_close(unit.difference, (a[:, -1] - a[:, 0]).mean(0), **close)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', ['sknet12', 'sk_shufflenetv2_x0_5', 'skresnet18'])
def test_recording_changes_no_bit_of_outputs_and_gradients(name, training):
    model = alive(timm.create_model(name, num_classes=10)).double().train(training)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def run():
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return y, [p.grad for p in model.parameters()]

    y, grads = run()
    with record(model) as units:
        recorded, recorded_grads = run()
    assert all(unit.count == 2 and not unit.last.requires_grad for unit in units.values())
    assert torch.equal(y, recorded)
    assert all(torch.equal(expected, found) for expected, found in zip(grads, recorded_grads))
    assert torch.equal(model(x), y) and units['SK_3_2'].count == 2  # the model is no longer recorded


@pytest.mark.parametrize(
    'name, options, number, expected',
    [
        ('sknet50', {}, 16, {'SK_2_3': 'stages.0.2.sk', 'SK_3_4': 'stages.1.3.sk', 'SK_5_3': 'stages.3.2.sk'}),
        ('sknet50', {'features_only': True}, 16, {'SK_3_4': 'stages_1.3.sk'}),
        ('skresnext50_32x4d', {}, 16, {'SK_2_3': 'layer1.2.conv2', 'SK_5_3': 'layer4.2.conv2'}),
        ('sk_shufflenetv2_x0_5', {}, 19, {'SK_2_1.shortcut.0': 'stages.0.0.shortcut.0', 'SK_4_4': 'stages.2.3.sk'}),
    ],
)
def test_units_have_the_papers_names(name, options, number, expected):
    units = attention.find_units(timm.create_model(name, **options))
    assert len(units) == number
    assert {key: units[key][0] for key in expected} == expected
    if name == 'sknet50':
        assert attention.typical_units(list(units)) == ['SK_2_3', 'SK_3_4', 'SK_5_3']


def test_units_of_any_network_have_the_names_of_their_modules():
    model = nn.ModuleDict({'a': SelectiveKernelConv(8, branches=M2), 'b': SelectiveKernelConv(8, branches=[[3, 1, 1]])})
    assert list(attention.find_units(model)) == ['a']  # with one branch, there is no attention
    assert attention.typical_units(['a', 'b', 'c', 'd']) == ['a', 'b', 'd']


def test_extents_are_those_of_the_dilated_network():
    model = timm.create_model('sknet50_m3', output_stride=16, num_classes=2)
    with torch.no_grad(), record(model.eval()) as units:
        model(torch.zeros(1, 3, 32, 32))
    assert units['SK_2_1'].extents == [3, 5, 7] and units['SK_5_2'].extents == [5, 9, 13]


def test_memory_does_not_grow():
    model = alive(timm.create_model('sknet12'))

    def held(units):
        tensors = [v for unit in units.values() for v in vars(unit).values() if isinstance(v, torch.Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    sizes = []
    with record(model) as units:
        for _ in range(4):
            model(torch.randn(2, 3, 32, 32))
            sizes.append(held(units))
    assert len(set(sizes)) == 1 and sizes[0] < 20_000


def test_a_recording_started_in_inference_mode_continues_outside():
    model = alive(timm.create_model('sknet12'))
    with torch.inference_mode():
        context = record(model)
        units = context.__enter__()
        model(torch.zeros(1, 3, 32, 32))
    model(torch.zeros(2, 3, 32, 32))
    context.__exit__(None, None, None)
    assert units['SK_2_1'].count == 3


@pytest.mark.slow
def test_a_model_compiled_inside_the_context_is_recorded_until_its_end():
    model = alive(timm.create_model('sknet12'))
    batches = [torch.randn(B, 3, 32, 32) for B in (2, 3, 5)]
    with torch.no_grad():
        with record(model) as eager:
            expected = [model(x) for x in batches]
        with record(model) as units:
            compiled = torch.compile(model, fullgraph=True)
            found = [compiled(x) for x in batches]
        compiled(batches[0])
    for unit in units.values():
        assert unit.count == 10
        torch.testing.assert_close(unit.mean, eager[unit.name].mean, rtol=1e-4, atol=1e-5)
    for y, x in zip(found, expected):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


BATCHES = [torch.randn(B, 8, 9, 7, generator=torch.Generator().manual_seed(B)) for B in (2, 3, 5)]


@pytest.fixture
def pair():
    """A model with our layer and timm's layer."""
    torch._dynamo.reset()  # discards the graphs of other tests
    return alive(nn.Sequential(LAYERS['ours'](), SelectiveKernel(16, 8, split_input=False)))


def types(model):
    return [(type(m), repr(m)) for m in model.modules()]


def compiled_layer(model, backend):
    return nn.Sequential(torch.compile(model[0], backend=backend), model[1])


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compiled_attention(model, backend):
    model[0].attn = torch.compile(model[0].attn, backend=backend)
    model[1].attn.compile(backend=backend)
    return model


@pytest.mark.parametrize('compiled', [torch.compile, compiled_in_place, compiled_layer, compiled_attention])
def test_a_model_that_was_compiled_before_is_recorded(pair, compiled):
    with torch.no_grad():
        with record(pair) as eager:
            expected = [pair(x) for x in BATCHES]
        counter = CompileCounter()
        model = compiled(pair, backend=counter)
        before = types(model)
        plain = [model(x) for x in BATCHES]
        assert counter.frame_count
        with record(model) as units:
            recorded = [model(x) for x in BATCHES]
        number = counter.frame_count
        assert types(model) == before
        plain += [model(x) for x in BATCHES]
        with record(model) as again:
            for x in BATCHES:
                model(x)
    assert counter.frame_count == number  # earlier graphs are reused
    for found in units, again:
        assert {name: unit.path for name, unit in found.items()} == {'0': '0', '1': '1'}
        for name, unit in found.items():
            assert unit.count == 10
            torch.testing.assert_close(unit.mean, eager[name].mean)
            torch.testing.assert_close(unit.std, eager[name].std)
            torch.testing.assert_close(unit.last, eager[name].last)
    for y, x in zip(plain + recorded, expected * 3):
        torch.testing.assert_close(y, x)


def test_graphs_of_another_model_stay_and_are_not_recorded(pair):
    other, counter = copy.deepcopy(pair), CompileCounter()
    compiled = torch.compile(other, backend=counter)
    with torch.no_grad():
        compiled(BATCHES[0])
        number = counter.frame_count
        with record(pair) as units:
            compiled(BATCHES[0])
            pair(BATCHES[1])
            torch.compile(pair, backend='eager')(BATCHES[1])
            compiled(BATCHES[0])
        compiled(BATCHES[0])
    assert number and counter.frame_count == number
    assert {unit.count for unit in units.values()} == {6}


def test_recordings_can_be_nested(pair):
    before = types(pair)
    with torch.no_grad(), record(pair) as outer:
        pair(BATCHES[0])
        with record(pair[0]) as inner:
            pair(BATCHES[1])
        with record(pair) as second:
            pair(BATCHES[2])
        assert types(pair) != before and repr(pair) == before[0][1]
    assert types(pair) == before
    assert [[unit.count for unit in units.values()] for units in (outer, inner, second)] == [[10, 10], [3], [5, 5]]


def test_units_that_share_an_attention_record_all_its_outputs():
    model = alive(nn.Sequential(SelectiveKernelConv(8, branches=M2), SelectiveKernelConv(8, branches=M2)))
    model[1].attn = model[0].attn
    before, x = types(model), BATCHES[0]
    with torch.no_grad():
        a = torch.cat([by_hand(model[0], x), by_hand(model[1], model[0](x))])
        with record(model) as units:
            model(x)
    assert types(model) == before
    for unit in units.values():
        assert unit.count == 4
        torch.testing.assert_close(unit.mean, a.double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', LAYERS)
def test_the_recorded_attention_is_what_the_unit_uses(name):
    model = alive(nn.Sequential(LAYERS[name]()))
    attn = model[0].attn
    with torch.no_grad(), record(model) as units:
        handle = attn.register_forward_hook(lambda module, args, a: torch.full_like(a, 0.25))
        model(BATCHES[0])
        assert (units['0'].last == 0.25).all()
        handle.remove()
        attn.forward = lambda s: type(attn).forward(attn, s) * 0 + 0.75
        model(BATCHES[0])
        assert (units['0'].last == 0.75).all()
    assert units['0'].count == 4


def test_a_scripted_attention_is_recorded(pair):
    with torch.no_grad():
        with record(pair) as eager:
            pair(BATCHES[0])
        pair[0].attn, pair[1].attn = (
            torch.jit.script(pair[0].attn),
            torch.jit.trace(pair[1].attn, torch.rand(2, 2, 8, 9, 7)),
        )
        before = types(pair)
        with record(pair) as units:
            pair(BATCHES[0])
    assert types(pair) == before
    for name, unit in units.items():
        torch.testing.assert_close(unit.mean, eager[name].mean)


def test_copies_made_inside_the_context_have_the_original_classes_and_are_not_recorded(pair):
    before, file = types(pair), io.BytesIO()
    with torch.no_grad(), record(pair) as units:
        pair(BATCHES[0])
        torch.save(pair, file)
        file.seek(0)
        for other in copy.deepcopy(pair), torch.load(file, weights_only=False):
            assert types(other) == before
            assert torch.equal(other(BATCHES[1]), pair(BATCHES[1]))
    assert [unit.count for unit in units.values()] == [8, 8]


def test_units_that_are_checkpointed_count_an_image_twice():
    model = alive(timm.create_model('sknet12')).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with record(model) as plain:
        model(x)
    model.train()
    for m in model.modules():
        m.training = not isinstance(m, nn.BatchNorm2d)
    model.set_grad_checkpointing()
    with record(model) as units:
        model(x).sum().backward()
    for name, unit in units.items():
        assert unit.count == 4
        torch.testing.assert_close(unit.mean, plain[name].mean)


def test_a_recording_without_a_forward_pass_is_an_error():
    model = timm.create_model('sknet12')
    with pytest.raises(RuntimeError, match='no forward pass was recorded.*result of torch.compile'):
        with record(model) as units:
            with pytest.raises(RuntimeError, match='SK_2_1 has no attention yet'):
                units['SK_2_1'].mean  # noqa: B018
    with pytest.raises(RuntimeError, match='has no attention yet'):
        units['SK_2_1'].std  # noqa: B018


def test_an_error_inside_the_context_is_raised_and_ends_the_recording():
    model = timm.create_model('sknet12')
    before, state = types(model), [list(vars(m)) for m in model.modules()]
    with pytest.raises(KeyError, match='own'):
        with record(model), record(model):
            raise KeyError('own')
    assert types(model) == before
    assert [list(vars(m)) for m in model.modules()] == state


def test_a_model_without_units_is_refused():
    with pytest.raises(ValueError, match='ResNet has no SK unit with two or more branches'):
        with record(timm.create_model('resnet18')):
            pass


# The scale experiment


@pytest.fixture
def folder(tmp_path):
    """12 images of the classes cat and dog, and one file that is not an image."""
    torch.manual_seed(0)
    for name in 'cat', 'dog':
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(6):
            noise = torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).resize((48, 40)).save(tmp_path / 'data' / name / f'{i}.png')
    (tmp_path / 'data' / 'cat' / 'broken.png').write_bytes(b'no image')
    return tmp_path / 'data'


@pytest.fixture(scope='module')
def model():
    return timm.create_model('sknet12.cifar10', pretrained=True).eval()


def test_images_are_enlarged_about_their_centre(tmp_path, model):
    for size in (32, 96):
        pixels = np.zeros((size, size), np.uint8)
        quarter = size // 4
        pixels[quarter:-quarter, quarter:-quarter] = 255  # a square with half the width
        Image.fromarray(pixels).convert('RGB').save(tmp_path / 'square.png')
        images = EnlargedImages(model, [tmp_path / 'square.png'], [1, 1.5, 2])[0]
        assert images.shape == (3, 3, 32, 32)
        config = resolve_data_config({}, model=model)
        assert torch.equal(images[0], create_transform(**config)(Image.open(tmp_path / 'square.png')))
        white = images[:, 0] > 0
        for share, factor in zip(white.float().mean((1, 2)), (1, 1.5, 2)):
            assert share == pytest.approx(min(1, 0.25 * factor**2), abs=0.04)
        assert torch.equal(white, white.flip(1)) and torch.equal(white, white.flip(2))


def files_of(folder):
    return sorted(folder.rglob('*.png'))


def test_the_experiment_agrees_with_recording_each_image(folder, model):
    complaints = []
    found = scale_experiment(model, files_of(folder), [1, 2], on_error=complaints.append)
    assert [file.name for file in found.files] == [f'{i}.png' for i in range(6)] * 2
    assert found.classes == ['cat'] * 6 + ['dog'] * 6
    assert len(complaints) == 1 and 'broken.png: not an image' in str(complaints[0])
    profile = torch.zeros_like(found.profile['SK_3_2'])
    for n, images in enumerate(EnlargedImages(model, found.files, [1, 2])[i] for i in range(12)):
        for s, image in enumerate(images):
            with torch.no_grad(), record(model) as units:
                model(image[None])
            for u, unit in enumerate(units.values()):
                assert found.difference[n, s, u] == pytest.approx(unit.difference.mean().item(), abs=1e-5)
                assert found.extent[n, s, u] == pytest.approx(unit.extent.mean().item(), abs=1e-5)
            profile[s] += units['SK_3_2'].difference / 12
    torch.testing.assert_close(found.profile['SK_3_2'], profile, rtol=1e-5, atol=1e-5)
    rows = table(found, found.classes)
    assert len(rows) == 2 * 2 * 5 and rows[0]['images'] == 6
    cats = found.difference[:6, 1, 0].mean().item()
    assert [r['difference'] for r in rows if (r['group'], r['unit'], r['scale']) == ('cat', 'SK_2_1', 2)] == [
        pytest.approx(cats)
    ]


def test_images_reach_a_model_on_a_cpu_in_channels_last(folder, model):
    seen = []
    handle = model.stem.conv.register_forward_hook(lambda module, args, out: seen.extend([args[0], module.weight]))
    scale_experiment(model, files_of(folder))
    handle.remove()
    assert seen and all(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in seen)


def test_images_are_read_by_workers_too(folder, model):
    alone = scale_experiment(model, files_of(folder))
    assert torch.equal(scale_experiment(model, files_of(folder), workers=2).difference, alone.difference)


def test_workers_can_be_started_as_on_macos_and_windows(folder, model):
    alone, before = scale_experiment(model, files_of(folder)), multiprocessing.get_start_method()
    multiprocessing.set_start_method('spawn', force=True)
    try:
        assert torch.equal(scale_experiment(model, files_of(folder), workers=1).difference, alone.difference)
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_an_interrupted_experiment_continues(folder, model, tmp_path):
    files, state = files_of(folder), tmp_path / 'state'
    whole = scale_experiment(model, files, batch_size=6)
    seen = []

    def interrupt(module, args):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(args[0]))

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        scale_experiment(model, files, state=state, batch_size=6)  # two images at three scales
    assert state.exists() and sum(seen) == 18
    handle.remove()
    kept = state.read_bytes()

    seen.clear()
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    again = scale_experiment(model, files, state=state, batch_size=6)
    assert sum(seen) == 18 and not state.exists()
    assert torch.equal(again.difference, whole.difference) and torch.equal(again.extent, whole.extent)
    for name, profile in whole.profile.items():
        torch.testing.assert_close(again.profile[name], profile)
        for statistic in 'count', 'mean', 'std':
            torch.testing.assert_close(getattr(again.units[name], statistic), getattr(whole.units[name], statistic))

    for other, scales in (kept, [1, 2]), (b'not a state', [1, 1.5, 2]):  # a state of another run, and an invalid file
        seen.clear()
        state.write_bytes(other)
        scale_experiment(model, files, scales, state=state)
        assert sum(seen) == 12 * len(scales) and not state.exists()
    handle.remove()


def test_an_interruption_while_an_error_is_reported_counts_no_image_twice(folder, model, tmp_path):
    broken, *files = sorted(files_of(folder), key=lambda file: file.name != 'broken.png')
    whole = scale_experiment(model, files, batch_size=6)
    for order in [*files[:3], broken, *files[3:]], [*files, broken]:  # then only the broken image remains

        def interrupt(error):
            raise KeyboardInterrupt

        state = tmp_path / 'state'
        with pytest.raises(KeyboardInterrupt):
            scale_experiment(model, order, state=state, batch_size=6, on_error=interrupt)
        again = scale_experiment(model, order, state=state, batch_size=6)
        assert torch.equal(again.difference, whole.difference) and not state.exists()
        for name, unit in whole.units.items():
            torch.testing.assert_close(again.profile[name], whole.profile[name])
            torch.testing.assert_close(again.units[name].mean, unit.mean)


def test_progress_that_cannot_be_saved_is_an_ordinary_error(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_sknet.attention.scale.SAVE_EVERY', 0)
    with pytest.raises(OSError, match='none/state: the progress cannot be saved'):
        scale_experiment(model, files_of(folder), state=tmp_path / 'none' / 'state')


@pytest.mark.parametrize('scales', [[], [0.5], [1, math.nan], [math.inf], [17], [1, 1]])
def test_scales_that_do_not_enlarge_are_refused(scales, model, folder):
    with pytest.raises(ValueError, match='at least 1'):
        scale_experiment(model, files_of(folder), scales)


# The command


def run(capsys, *argv):
    code = main(['attention', *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_command_draws_a_folder_by_class(folder, tmp_path, capsys):
    out, figures = tmp_path / 'figure.png', tmp_path / 'figures.csv'
    code, said, complaint = run(capsys, folder, '--out', out, '--csv', figures, '--units', 'SK_3_2', 'SK_4_2')
    assert (code, said) == (1, f'Wrote {out}.\n') and 'broken.png' in complaint
    assert min(Image.open(out).size) > 500
    with open(figures) as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 2 * 3 * 5 and {row['group'] for row in rows} == {'cat', 'dog'}
    assert all(-1 < float(row['difference']) < 1 and 3 < float(row['extent']) < 5 for row in rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['data', 'figure.png', 'figures.csv']


def test_the_command_draws_single_images(folder, tmp_path, capsys):
    out, figures = tmp_path / 'figure.svg', tmp_path / 'figures.csv'
    images = [folder / 'cat' / '0.png', folder / 'dog' / '1.png']
    assert run(capsys, *images, '--scales', 1, 3, '--out', out, '--csv', figures)[0] == 0
    assert xml.etree.ElementTree.parse(out).getroot().tag.endswith('svg')
    with open(figures) as f:
        assert {row['group'] for row in csv.DictReader(f)} == set(map(str, images))
    assert run(capsys, images[0], folder / 'cat' / 'broken.png', '--out', out)[0] == 1


def draw(classes, file):
    model = timm.create_model('sknet12')
    units = {name: attention.Unit(name, *found) for name, found in attention.find_units(model).items()}
    difference = torch.rand(len(classes), 3, len(units))
    found = attention.ScaleResult(
        files=[], classes=classes, scales=[1, 1.5, 2], units=units, difference=difference, extent=difference, profile={}
    )
    draw_classes(found, ['SK_2_1', 'SK_3_2'], file)


def test_a_thousand_classes_can_be_drawn(tmp_path):
    draw([f'n{i:08d}' for i in range(1000)], tmp_path / 'figure.png')
    assert Image.open(tmp_path / 'figure.png').size[0] > 1000


def test_classes_of_imagenet_are_named_in_words(tmp_path):
    draw(['n01440764', 'n99999999', 'red, blue'], tmp_path / 'figure.svg')
    text = (tmp_path / 'figure.svg').read_text()
    assert all(f'<!-- {name} -->' in text for name in ('tench', 'n99999999', 'red, blue')) and 'n01440764' not in text


def test_names_with_invalid_bytes_or_formulas_can_be_drawn(tmp_path):
    draw(['p$^$q', 'p$\\x$', 'bad\udcff', 'two\nlines'], tmp_path / 'figure.svg')
    text = (tmp_path / 'figure.svg').read_text()
    assert all(f'<!-- {name} -->' in text for name in ('p$^$q', 'p$\\x$', 'bad\\udcff', 'two?lines'))


def test_the_command_does_not_overwrite_its_images(folder, tmp_path, capsys):
    image = tmp_path / 'image.png'
    image.write_bytes((folder / 'cat' / '0.png').read_bytes())
    code, _, complaint = run(capsys, image, '--out', image)
    assert code == 2 and 'would replace the image' in complaint
    other_name = tmp_path / 'other.png'  # as IMAGE.PNG is where names ignore case
    other_name.hardlink_to(image)
    assert 'would replace the image' in run(capsys, image, '--out', other_name)[2]
    assert image.read_bytes() == (folder / 'cat' / '0.png').read_bytes()
    out = folder / 'figure.png'
    for _ in range(2):  # in the second run, the figure is in the folder of images
        run(capsys, folder, '--out', out, '--csv', tmp_path / 'figures.csv')
        with open(tmp_path / 'figures.csv') as f:
            assert {row['group'] for row in csv.DictReader(f)} == {'cat', 'dog'}
    (tmp_path / 'folder.csv').mkdir()
    assert 'must be a file' in run(capsys, image, '--out', out, '--csv', tmp_path / 'folder.csv')[2]


def test_two_networks_in_one(model):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = copy.deepcopy(model), copy.deepcopy(model)

    found = attention.find_units(Two())
    assert len(found) == 2 * len(attention.find_units(model)) and all(name == unit[0] for name, unit in found.items())


def test_another_model_of_the_same_kind_was_compiled_before(model):
    other = copy.deepcopy(model)
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.compile(other, backend='eager')(x)
        with record(model) as units:
            compiled = torch.compile(model, backend='eager')
            for batch in 3, 5, 3:
                compiled(torch.randn(batch, 3, 32, 32))
    assert {unit.count for unit in units.values()} == {11}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_identical_images_have_no_deviation(dtype):
    model = timm.create_model('sknet12', dtype=dtype).eval()
    x = torch.randn(1, 3, 32, 32, dtype=dtype)
    with record(model) as units, torch.inference_mode():
        for _ in range(3):
            model(x)
    assert all(unit.std.max() < 1e-7 for unit in units.values())


@pytest.mark.parametrize(
    'argv, complaint',
    [
        (['{folder}', '--out', 'figure.pdf'], "--out must end in .png or .svg, got 'figure.pdf'"),
        (['{folder}', '--out', 'nowhere/figure.png'], "no folder 'nowhere'"),
        (['{folder}', '--out', 'figure.png', '--csv', 'figures.txt'], '--csv must end in .csv'),
        (['{folder}', '--out', 'figure.png', '--units', 'SK_9_9'], 'has no unit SK_9_9. It has SK_2_1, SK_3_1'),
        (['{folder}', '--out', 'figure.png', '--scales', '0.5'], 'at least 1'),
        (['{folder}/cat/broken.png', '--out', 'figure.png'], 'not an image'),
        (['{folder}/none.png', '--out', 'figure.png'], 'none.png'),
        (['{empty}', '--out', 'figure.png'], 'no image in this folder'),
        (['{folder}/cat/0.png'] + ['{folder}/cat/1.png'] * 12 + ['--out', 'figure.png'], '13 images do not fit'),
        (['{folder}', '--out', 'figure.png', '--model', 'sknet13'], "'sknet13' cannot be loaded"),
    ],
)
def test_invalid_input_is_reported_in_one_line_and_writes_nothing(
    argv, complaint, folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / 'here').mkdir()
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    code, said, err = run(capsys, *[arg.format(folder=folder, empty=tmp_path / 'empty') for arg in argv])
    assert (code, said) == (2, '') and complaint in err and len(err.splitlines()) == 1
    assert not list((tmp_path / 'here').iterdir())


def test_folders_with_problems_do_not_stop_the_others(folder, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (folder / 'bird').symlink_to('nowhere')
    (folder / 'hound').symlink_to('dog')
    (folder / 'cat' / 'broken.png').unlink()
    out, figures = tmp_path / 'figure.png', tmp_path / 'figures.csv'
    options = ['--batch-size', 4, '--workers', 1, '--device', 'cpu', '--csv', figures]
    code, _, err = run(capsys, tmp_path / 'empty', folder, f'{"x" * 300}.png', '--out', out, *options)
    assert code == 1 and len(err.splitlines()) == 3
    assert all(reason in err for reason in ('empty: no image', 'bird: broken link', 'x.png: cannot be read'))
    with open(figures) as f:
        assert {row['group'] for row in csv.DictReader(f)} == {'cat', 'dog', 'hound'}


def test_a_model_without_units_cannot_be_drawn(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_sknet.predict.load_model', lambda name, device: timm.create_model('resnet18').eval())
    code, _, err = run(capsys, folder, '--out', tmp_path / 'figure.png')
    assert code == 2 and 'no SK unit' in err


def test_without_matplotlib_the_error_names_the_extra(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib', None)
    monkeypatch.delitem(__import__('sys').modules, 'timm_sknet.attention.figures')
    code, _, err = run(capsys, folder, '--out', tmp_path / 'figure.png')
    assert code == 2 and 'pip install matplotlib' in err
