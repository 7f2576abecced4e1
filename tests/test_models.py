"""Every registered model: size, arguments, state-dict keys, and the interfaces of timm."""

import itertools
import json
import math
import re
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from models import MODELS
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.layers import create_pool2d
from timm.models import get_pretrained_cfg
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from versions import since

from timm_sknet.sknets import default_cfgs, model_cfgs, paper_top1

SIZES = {  # parameters, GMACs of convolutions and linears (computed from the paper's tables, not by the package)
    'sknet26': (16_746_408, 2.587),
    'sknet50': (27_479_784, 4.463),
    'sknet101': (48_736_040, 8.449),
    'sknet50_m3': (29_249_512, 4.694),
    'sknet50_caffe': (27_479_784, 4.463),
    'sknet101_caffe': (48_686_760, 8.449),
    'sknet29_16x32d': (27_739_626, 4.181),
    'sknet12': (460_186, 0.0444),
    'sknet14': (457_978, 0.1383),
    'sk_shufflenetv2_x0_5': (1_478_432, 0.0424),
    'sk_shufflenetv2_x1_0': (2_543_040, 0.1493),
    'sk_resnet50': (26_154_496, 4.147),
    'sk_resnet101': (45_678_112, 7.921),
    'sk_resnet18_timm': (11_958_056, 1.814),
    'sk_resnet34_timm': (22_282_376, 3.664),
    # Google's graph of SimCLRv2
    'sk_resnet50x1_simclr': (37_264_584, 6.18),
    'sk_resnet50x2_simclr': (144_403_048, 24.69),
    'sk_resnet101x1_simclr': (66_711_304, 11.86),
    'sk_resnet101x2_simclr': (261_229_224, 47.40),
    'sk_resnet152x1_simclr': (90_989_896, 17.53),
    'sk_resnet152x2_simclr': (357_495_528, 70.11),
    'sk_resnet152x3_simclr': (800_849_160, 157.73),
}
CIFAR = ['sknet12', 'sknet29_16x32d']
TEN_CLASSES = [*CIFAR, 'sknet14']
IMAGENET = [name for name in MODELS if name not in TEN_CLASSES]
# One model for each kind of unit, and one with the stem and shortcuts of SimCLRv2.
ONE_OF_EACH = ['sknet12', 'sk_shufflenetv2_x0_5', 'sknet26', 'sk_resnet50x1_simclr']


def meta(name, **kwargs):
    return timm.create_model(name, device='meta', **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_table_of_sizes_holds_every_model():
    assert set(SIZES) == set(model_cfgs) == set(timm.list_models(module='sknets')) == set(default_cfgs)
    assert set(paper_top1) <= set(model_cfgs)


@pytest.mark.parametrize('name', SIZES)
def test_parameters_and_macs(name):
    model = meta(name).eval()
    expected_parameters, expected_gmacs = SIZES[name]
    assert parameters(model) == expected_parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *model.pretrained_cfg['input_size'], device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected_gmacs, rel=0.005)


@pytest.mark.parametrize(
    'branch, millions',
    [
        ([3, 3, 32], 27.480),
        ([3, 2, 32], 27.480),
        ([3, 1, 32], 27.480),
        ([5, 1, 64], 28.030),
        ([7, 1, 128], 27.991),
    ],
)
def test_ablation_table_of_the_paper(branch, millions):
    assert parameters(meta('sknet50', branches=[[3, 1, 32], branch])) == pytest.approx(millions * 1e6, abs=500)


def test_the_caffe_networks_are_those_of_the_authors_files():
    for name in 'sknet50_caffe', 'sknet101_caffe':
        assert meta(name).pool.ceil_mode and meta(name).pool.padding == 0
        assert meta(name).pretrained_cfg['tag'] == 'authors_in1k'
    widths = [stage[0].sk.attn.fc1.out_channels for stage in meta('sknet101_caffe').stages]
    assert widths == [32, 16, 32, 64]


def test_all_tags_of_a_model_have_the_same_network():
    for name in MODELS:
        cfgs = default_cfgs[name]
        shapes = [{key: value.shape for key, value in meta(f'{name}.{tag}').state_dict().items()} for tag in cfgs.tags]
        assert all(found == shapes[0] for found in shapes)
        assert len({str(meta(f'{name}.{tag}').pool) for tag in cfgs.tags}) == 1


def test_stem_pools():
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    pad, ceil = (timm.create_model('sknet26', stem_pool=kind).pool for kind in ('pad', 'ceil'))
    assert pad(x).flatten().tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    assert ceil(x).flatten().tolist() == [14, 16, 17, 26, 28, 29, 32, 34, 35]
    same, timms = timm.create_model('sknet26', stem_pool='same').pool, create_pool2d('max', 3, 2, padding='same')
    for height, width in itertools.product(range(1, 8), repeat=2):
        x = torch.randn(1, 2, height, width)
        assert torch.equal(same(x), timms(x))
    assert isinstance(meta('sknet26', stem_pool='').pool, nn.Identity)


def test_one_branch_is_the_plain_network():
    model = meta('sknet50', branches=[[3, 1, 32]])
    resnext = timm.create_model('resnext50_32x4d', device='meta')
    assert parameters(model) == parameters(resnext)


def test_arguments_may_come_from_json():
    kwargs = json.loads(
        '{"branches": [[3, 1, 8], [5, 1, 8]], "depths": [1, 1, 1, 1], "attn_widths": [8, 8, 8, 8], "r": 8, "L": 8,'
        ' "stem_pool": "ceil", "act_layer": "gelu", "norm_layer": "groupnorm1", "output_stride": 16}'
    )
    model = timm.create_model('sknet26', **kwargs).eval()
    assert model(torch.randn(1, 3, 33, 47)).shape == (1, 1000)
    names = {type(m).__name__ for m in model.modules()}
    assert 'GELU' in names and not any('BatchNorm' in n or 'ReLU' in n for n in names)


def test_custom_norm_keeps_its_momentum():
    def momenta(**kwargs):
        modules = meta('sknet12', **kwargs).modules()
        return {(m.momentum, m.eps) for m in modules if isinstance(m, nn.BatchNorm2d)}

    assert momenta() == {(0.05, 1e-5)}
    assert momenta(bn_momentum=0.01, bn_eps=1e-3) == {(0.01, 1e-3)}
    assert momenta(norm_layer=nn.BatchNorm2d) == {(0.1, 1e-5)}
    assert momenta(norm_layer='batchnorm2d', bn_momentum=0.2) == {(0.2, 1e-5)}


@pytest.mark.parametrize('name', MODELS)
def test_batch_norm_momentum_is_the_authors(name):
    momentum = 0.1 if name.startswith('sk_resnet') else 0.05
    assert {m.momentum for m in meta(name).modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = timm.create_model('sknet26')
    unit = model.stages[3][1]
    for module, std in [
        (unit.conv1.conv, (2 / 2048) ** 0.5),
        (unit.conv3.conv, (2 / 1024) ** 0.5),
        (unit.sk.branches[1].conv, (2 / (32 * 9)) ** 0.5),
        (unit.sk.attn.fc1, 0.01),
        (unit.sk.attn.fc2, 0.01),
        (model.head.fc, 0.01),
    ]:
        assert module.weight.std().item() == pytest.approx(std, rel=0.03)
    assert not model.head.fc.bias.any()
    assert all(m.weight.eq(1).all() and not m.bias.any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.stem.conv.weight.std().item() == pytest.approx((2 / 147) ** 0.5, rel=0.03)
    by_fan_out = timm.create_model('sk_resnet50').stages[3][1].conv1.conv.weight
    assert by_fan_out.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.03)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_weight_decay_spares_batch_norm(name):
    model = meta(name)
    spared, decayed = param_groups_weight_decay(model, weight_decay=1e-4)
    assert spared['weight_decay'] == 0 and decayed['weight_decay'] == 1e-4
    spared = {id(p) for p in spared['params']}
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert {id(m.weight), id(m.bias)} <= spared
        elif isinstance(m, (nn.Conv2d, nn.Linear)):
            assert id(m.weight) not in spared


def test_zero_init_last_makes_units_identities():
    for name in 'sknet26', 'sknet12', 'sk_resnet50x1_simclr':  # the last one by default, as Google's code
        model = timm.create_model(name, **{} if 'simclr' in name else {'zero_init_last': True}).eval()
        x = torch.rand(1, model.feature_info[0]['num_chs'] if name == 'sknet12' else 256, 4, 4)
        unit = model.stages[0][-1]
        torch.testing.assert_close(unit(x), x)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('argument', ['drop_block_rate', 'drop_blok', 'img_size'])
def test_unknown_arguments_are_refused(name, argument):
    with pytest.raises(TypeError, match=argument):
        meta(name, **{argument: 0.1})


@pytest.mark.parametrize(
    'name, kwargs, words',
    [
        ('sknet50', dict(output_stride=12), r'output_stride must be one of \[4, 8, 16, 32\].*12'),
        ('sknet29_16x32d', dict(output_stride=8), r'output_stride must be one of \[1, 2, 4\].*8'),
        ('sk_shufflenetv2_x1_0', dict(drop_path_rate=0.1), 'no residual.*drop_path_rate=0.1'),
        ('sk_shufflenetv2_x1_0', dict(zero_init_last=True), 'no residual.*zero_init_last=True'),
        ('sknet50', dict(stem_pool='valid'), "stem_pool must be one of.*'ceil', 'same'.*'valid'"),
        ('sknet50', dict(unit='bottle'), "unit must be one of.*'bottleneck'.*'bottle'"),
        ('sknet50', dict(init='xavier'), "init must be one of.*'caffe', 'pytorch', 'tensorflow'.*'xavier'"),
        ('sk_shufflenetv2_x1_0', dict(shortcut_pool=True), 'Shuffle units.*shortcut_pool=True'),
        (
            'sk_resnet18_timm',
            dict(branches=[[3, 1, 1]] * 3),
            r'in_channels must be divisible by the number of branches \(3\), got 64',
        ),
        (
            'sknet50',
            dict(norm_layer='groupnorm1', bn_eps=0.1),
            "bn_eps=0.1 needs a batch norm, but norm_layer is 'groupnorm1'",
        ),
        ('sknet50', dict(depths=[1, 2]), r'mid_widths must have one value for each of the 2 stages'),
        ('sknet50', dict(attn_widths=[1, 2]), r'attn_widths must have one value for each of the 4 stages.*\[1, 2\]'),
        ('sknet50', dict(branches=[[3, 1, 7]]), 'must be divisible by its 7 groups, got 128 and 128'),
        # timm's --model-kwargs passes false as the string 'false'
        ('sknet50', dict(attention='false'), "attention must be True or False, got 'false'"),
        ('sknet50', dict(split_input='false'), "split_input must be True or False, got 'false'"),
        ('sknet50', dict(shortcut_pool='false'), "shortcut_pool must be True or False, got 'false'"),
        ('sknet50', dict(zero_init_last='false'), "zero_init_last must be True or False, got 'false'"),
        ('sknet50', dict(memory_efficient='false'), "memory_efficient must be True or False, got 'false'"),
    ],
)
def test_impossible_arguments_are_named(name, kwargs, words):
    with pytest.raises(ValueError, match=words):
        meta(name, **kwargs)


@pytest.mark.parametrize('name', ONE_OF_EACH)
@pytest.mark.parametrize('size', [(33, 47), (64, 64)])
def test_other_image_sizes(name, size):
    model = timm.create_model(name, num_classes=5).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_imagenet_size_320():
    model = meta('sknet50').eval()
    assert model.forward_features(torch.zeros(1, 3, 320, 320, device='meta')).shape == (1, 2048, 10, 10)


@pytest.mark.parametrize('name', IMAGENET)
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride(name, output_stride):
    model = meta(name, output_stride=output_stride, features_only=True).eval()
    maps = model(torch.zeros(1, 3, 96, 96, device='meta'))
    assert [96 // m.shape[-1] for m in maps] == model.feature_info.reduction()
    assert model.feature_info.reduction()[-1] == output_stride


def test_output_stride_agrees_with_timm():
    theirs = timm.create_model('skresnext50_32x4d', output_stride=8).eval()
    ours = timm.create_model('sknet50', output_stride=8).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', [64, 85])
@pytest.mark.parametrize('name', MODELS)
def test_dilated_features_contain_those_of_the_plain_network(name, size):
    """With one branch only, because attention pools over the whole map, including the features between."""
    cfg = model_cfgs[name]
    stages = range(1, 1 + len(cfg.depths))
    args = dict(branches=[[3, 1, 1]], L=8, dtype=torch.float64, depths=[min(depth, 2) for depth in cfg.depths])
    args |= dict(
        mid_widths=[8 * i for i in stages], widths=[16 * i for i in stages], head_width=8 * bool(cfg.head_width)
    )
    plain = timm.create_model(name, **args).eval()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = plain.forward_features(images)
    reductions = [info['reduction'] for info in plain.feature_info if info['module'].startswith('stages')]
    for output_stride in reductions:
        dilated = timm.create_model(name, output_stride=output_stride, **args).eval()
        dilated.load_state_dict(plain.state_dict())
        k = reductions[-1] // output_stride
        found = dilated.forward_features(images)[..., ::k, ::k]
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max(), output_stride


def test_dilation_multiplies_each_branchs_own():
    model = meta('sknet50', output_stride=8)
    dilations = [[b.conv.dilation[0] for b in unit.sk.branches] for stage in model.stages for unit in stage]
    assert dilations[:8] == [[1, 2]] * 8
    assert dilations[8:13] == [[2, 4]] * 5
    assert dilations[14:] == [[4, 8]] * 2


@pytest.mark.parametrize('name', MODELS)
def test_features_only(name):
    model = meta(name, features_only=True)
    if name in CIFAR:
        assert model.feature_info.reduction() == [1, 2, 4]
    elif name == 'sknet14':
        assert model.feature_info.reduction() == [2, 4, 8, 16]
    else:
        assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    picked = meta(name, features_only=True, out_indices=(1, 2)).eval()
    maps = picked(torch.zeros(1, 3, 64, 64, device='meta'))
    assert [m.shape[1] for m in maps] == picked.feature_info.channels()
    assert [64 // m.shape[-1] for m in maps] == picked.feature_info.reduction()


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_heads(name):
    model = timm.create_model(name, in_chans=1, num_classes=7, drop_rate=0.2).eval()
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, 7)
    for pool in 'fast', 'max', 'avg':
        model.reset_classifier(3, pool)
        assert model(x).shape == (2, 3)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.get_classifier() is model.head.fc
    model.reset_classifier(0, '')
    assert model(x).shape == model.forward_features(x).shape
    assert timm.create_model(name, global_pool='fast').eval()(torch.randn(1, 3, 64, 64)).ndim == 2


@pytest.mark.parametrize('pool', ['avg', 'catavgmax'])
def test_hidden_size_of_the_head_follows_the_pool(pool):
    model = timm.create_model('sknet12', global_pool=pool).eval()
    x = torch.randn(1, 3, 32, 32)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape[1] == model.head_hidden_size
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (1, 3)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape[1] == model.head_hidden_size


@pytest.mark.parametrize('name', ['sknet12', 'sknet26'])
def test_drop_path_rises_to_its_rate(name):
    model = meta(name, drop_path_rate=0.2)
    rates = [getattr(unit.drop_path, 'drop_prob', 0.0) for stage in model.stages for unit in stage]
    assert rates[0] == 0 and rates == sorted(rates) and rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in False, True:
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('memory_efficient', [False, True])
@pytest.mark.parametrize('name', ['sknet26', 'sknet12', 'sk_shufflenetv2_x0_5'])  # the three kinds of units
def test_full_backward_hooks_on_every_layer_are_called(name, memory_efficient):
    """Such a hook forbids that the output of its layer is changed in place. opacus sets them."""
    model = timm.create_model(name, memory_efficient=memory_efficient)
    layers = {m for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
    called = set()
    for layer in layers:
        layer.register_full_backward_hook(lambda layer, *gradients: called.add(layer))
    model(torch.randn(2, 3, 32, 32, requires_grad=True)).mean().backward()
    assert called == layers


@pytest.mark.parametrize('name', ['sknet26', 'sknet12', 'sk_shufflenetv2_x0_5'])  # the three kinds of units
def test_a_traced_model_agrees_with_and_without_gradients(name):
    model = timm.create_model(name).eval()
    x, other = torch.randn(1, 3, 64, 64), torch.randn(2, 3, 64, 64)
    for gradients in True, False:
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(torch.jit.trace(model, x)(other), model(other), rtol=1e-4, atol=1e-5)


def test_any_stride_gives_all_paths_of_a_unit_the_same_size():
    model = timm.create_model('sknet12', strides=[1, 3, 4]).eval()
    for size in range(32, 38):
        assert model.forward_features(torch.randn(1, 3, size, size)).shape[2] == math.ceil(math.ceil(size / 3) / 4)


def test_fewer_than_no_classes_leave_out_the_classifier_as_in_timm():
    assert timm.create_model('sknet12', num_classes=-1)(torch.randn(2, 3, 32, 32)).shape == (2, 96)


def test_the_callers_cfg_is_not_changed():
    cfg = {'input_size': [3, 64, 64]}  # from JSON
    model = timm.create_model('sknet12', pretrained_cfg=cfg)
    assert cfg == {'input_size': [3, 64, 64]} and model.pretrained_cfg['input_size'] == (3, 64, 64)


@pytest.mark.parametrize('name', MODELS)
def test_layer_decay_groups_reach_every_parameter(name):
    model = meta(name)
    for coarse in False, True:
        groups = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(groups) == {key for key, _ in model.named_parameters()}
        assert groups['stem.conv.weight'] == 0 and groups['head.fc.bias'] == max(groups.values())
        units = sum(model_cfgs[name].depths) if not coarse else len(model_cfgs[name].depths)
        assert len(set(groups.values())) >= units + 2


@pytest.mark.parametrize('name', model_cfgs)
def test_cfgs_say_whose_weights_and_which_licence(name):
    for tag in default_cfgs[name].tags:
        cfg = get_pretrained_cfg(f'{name}.{tag}')
        for field in 'origin_url', 'paper_ids', 'paper_name', 'description', 'notes':
            assert getattr(cfg, field), field
        assert bool(cfg.license) == bool(cfg.has_weights)
        assert cfg.num_classes == (10 if name in TEN_CLASSES else 1000)
        assert len(cfg.label_names or ()) == (10 if name in TEN_CLASSES else 0)


@pytest.mark.parametrize('name', [name for name in MODELS if not default_cfgs[name].is_pretrained])
def test_models_without_weights_name_models_with_weights(name):
    with pytest.raises(ValueError, match=f'no public weights of {name}.*sknet50.ra_in1k, sknet12.cifar10'):
        meta(name, pretrained=True)


def test_own_weights_of_a_model_without_public_ones(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model('sk_shufflenetv2_x0_5')
    save_file(model.state_dict(), tmp_path / 'own.safetensors')
    overlay = dict(file=str(tmp_path / 'own.safetensors'))
    again = timm.create_model('sk_shufflenetv2_x0_5', pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@since('torch', '2.15', 'the exporter of torch 2.11 assumes that sizes are odd or even; none between was run')
def test_the_shuffle_exports_with_dynamic_sizes():
    model = timm.create_model('sk_shufflenetv2_x0_5').eval()
    images, other = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 65, 90)
    dim = torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: dim, 2: dim, 3: dim},)).module()
    torch.testing.assert_close(exported(other), model(other))


def test_the_shuffle_exports_with_every_other_exporter(tmp_path):
    model = timm.create_model('sk_shufflenetv2_x0_5').eval()
    images, other = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 65, 90)
    for form in torch.jit.script(model), torch.fx.symbolic_trace(model):
        torch.testing.assert_close(form(other), model(other))
    for opset in 11, 17:
        file, axes = tmp_path / f'{opset}.onnx', {'x': {0: 'batch', 2: 'height', 3: 'width'}}
        settings = dict(dynamo=False, opset_version=opset, input_names=['x'], dynamic_axes=axes)
        torch.onnx.export(model, (images,), file, **settings)
        (found,) = onnxruntime.InferenceSession(file).run(None, {'x': other.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(other), rtol=1e-4, atol=1e-6)
    quant_pre_process(tmp_path / '17.onnx', tmp_path / 'prepared.onnx')


@pytest.mark.parametrize('name', model_cfgs)
def test_state_dict_keys_are_stable(name):
    """Checkpoints of users rely on the keys in keys.json: a changed key needs a renaming in `native_keys`."""
    promised = json.loads((Path(__file__).parent / 'keys.json').read_text())
    found = sorted({re.sub(r'(?<=\.)\d+', '*', key) for key in meta(name).state_dict()})
    assert found == promised['simclr' if name.endswith('_simclr') else model_cfgs[name].unit]
