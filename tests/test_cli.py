"""The command line, mostly called in the process of the tests."""

import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import load_model_config_from_hf  # noqa: F401  imports the Hub code before a test sets it offline

import timm_sknet
from timm_sknet import images as image_files
from timm_sknet import labels, predict
from timm_sknet.cli import main

LABELS = ['left', 'middle', 'right']
# Answers of the embedded model for the photographs. A wrong answer would stay here and in the README.
ANSWERS = {'bird.jpg': 'bird', 'cat.jpg': 'cat', 'deer.jpg': 'deer', 'horse.jpg': 'horse'}


def write_model(folder, num_classes, label_names=None, in_chans=3, **cfg):
    """Writes a random network to a folder; returns the argument --model for it."""
    torch.manual_seed(0)
    network = timm.create_model('sknet12', num_classes=num_classes, in_chans=in_chans)
    if num_classes:
        torch.nn.init.normal_(network.head.fc.weight)
    save_file(network.state_dict(), folder / 'model.safetensors')
    config = dict(architecture='sknet12', num_classes=num_classes, model_args=dict(in_chans=in_chans))
    config['pretrained_cfg'] = dict(input_size=[in_chans, 32, 32]) | cfg
    if label_names is not None:
        config['label_names'] = label_names
    (folder / 'config.json').write_text(json.dumps(config))
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """The argument --model for a folder with a random network of three classes."""
    cfg = dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], crop_pct=1.0)
    return write_model(tmp_path_factory.mktemp('model'), 3, LABELS, **cfg)


@pytest.fixture
def images(tmp_path):
    """A folder with images of several formats and modes, some in a subfolder, and a text file."""
    folder = tmp_path / 'images'
    (folder / 'sub').mkdir(parents=True)
    torch.manual_seed(0)
    for name, mode, size in [
        ('b.PNG', 'RGB', (40, 60)),
        ('a.jpg', 'RGB', (80, 50)),
        ('sub/grey.jpeg', 'L', (32, 32)),
        ('sub/palette.bmp', 'P', (33, 35)),
        ('sub/alpha.webp', 'RGBA', (64, 48)),
    ]:
        noise = torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).convert(mode).save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    return folder


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def run_json(capsys, *argv):
    code, out, err = run(capsys, 'predict', '--json', *argv)
    return code, json.loads(out), err


def test_without_arguments_the_embedded_model_classifies_the_photographs(capsys):
    code, out, err = run(capsys, 'predict')
    assert (code, err) == (0, '')
    found = dict(re.findall(r'(\w+\.jpg)\n +[\d.]+% +(\w+)\n', out))
    assert found == ANSWERS


def test_every_photograph_is_small_and_has_its_source_beside_it():
    readme = (predict.PHOTOS / 'README.md').read_text()
    photos = image_files.find_images(predict.PHOTOS)
    assert [p.name for p in photos] == sorted(ANSWERS)
    for photo in photos:
        assert photo.stat().st_size < 60_000
        assert f'`{photo.name}`' in readme


def test_class_names_of_imagenet_are_timms():
    model = timm.create_model('sk_shufflenetv2_x0_5', device='meta')
    assert labels.class_names(model)[281] == 'tabby, tabby cat'


@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        (dict(label_names=['n1', 'n2'], label_descriptions={'n1': 'cat'}), ['cat', 'n2']),
        (dict(label_names={'0': 'cat', '1': 'dog'}), ['cat', 'dog']),
        (dict(label_names={'1': 'dog', '0': 'cat'}, label_descriptions={'dog': 'a dog'}), ['cat', 'a dog']),
        (dict(label_names={1: 'dog', 0: 'cat'}), ['cat', 'dog']),
        (dict(label_names=['cat', 'dog', 'one too many']), ['0', '1']),
        (dict(), ['0', '1']),
    ],
)
def test_class_names_are_those_of_the_cfg_else_the_index(cfg, expected):
    model = timm.create_model('sknet12', num_classes=2, device='meta')
    model.pretrained_cfg = cfg
    assert labels.class_names(model) == expected


def test_class_names_in_a_mapping_are_found_by_their_index(capsys, tmp_path):
    names = [f'class {i}' for i in range(12)]
    mapping = {i: names[int(i)] for i in sorted(map(str, range(12)))}  # '0', '1', '10', '11', '2', ...
    model = write_model(tmp_path, 12, mapping)
    code, found, err = run_json(capsys, predict.PHOTOS / 'cat.jpg', '--model', model, '--topk', 12)
    assert (code, err) == (0, '')
    assert {p['index']: p['label'] for p in found[0]['predictions']} == dict(enumerate(names))


@pytest.mark.parametrize(
    'value',
    [
        {'0': 'cat', '1': 'dog', '3': 'bird'},
        {'0': 'cat', '1': 'dog'},
        {'0': 'cat', '00': 'tiger', '1': 'dog'},
        {'cat': 0, 'dog': 1, 'bird': 2},
        {'0': 'cat', '1': 'dog', '2': 3},
        ['cat', 'dog'],
        ['cat', 'dog', ['bird']],
        'cat',
        3,
    ],
    ids=str,
)
def test_class_names_that_do_not_fit_give_indices_and_one_line(capsys, tmp_path, value):
    model = write_model(tmp_path, 3, value)
    code, found, err = run_json(capsys, *[predict.PHOTOS / 'cat.jpg'] * 40, '--model', model)
    assert code == 0 and len(found) == 40
    assert all(p['label'] == str(p['index']) for result in found for p in result['predictions'])
    assert re.fullmatch(
        'timm-sknet: label_names must be a list of 3 strings, .*Class indices are shown instead. .*\n', err
    )


@pytest.mark.parametrize('name', ['sknet12', 'resnet18'])
def test_images_reach_a_model_on_a_cpu_in_channels_last(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    config = resolve_data_config({'input_size': (3, 32, 32)}, model=model)
    model.pretrained_cfg |= {key: config[key] for key in ('input_size', 'mean', 'std', 'crop_pct')}
    files = image_files.find_images(predict.PHOTOS)
    images = torch.stack([create_transform(**config)(Image.open(file)) for file in files])
    with torch.no_grad():
        expected = model(images).softmax(-1)
    seen = []
    handle = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(
        lambda module, args, out: seen.extend([args[0], module.weight])
    )
    found = [predictions for _, predictions in predict.classify(model, files)]
    handle.remove()
    assert seen and all(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in seen)
    probabilities = torch.tensor([[p.probability for p in sorted(ps, key=lambda p: p.index)] for ps in found])
    torch.testing.assert_close(probabilities, expected)


def test_predictions_are_those_of_the_model_on_timms_preprocessing(capsys, model, images):
    # several batches, the last one not full
    code, found, err = run_json(capsys, images, '--model', model, '--batch-size', 2)
    assert (code, err) == (0, '')
    names = ['a.jpg', 'b.PNG', 'sub/alpha.webp', 'sub/grey.jpeg', 'sub/palette.bmp']
    assert [result['file'] for result in found] == [str(images / name) for name in names]

    network = timm.create_model(model, pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=network))
    for result in found:
        with torch.no_grad():
            expected = network(transform(Image.open(result['file']).convert('RGB'))[None])[0].softmax(0)
        predictions = result['predictions']
        assert [p['index'] for p in predictions] == expected.argsort(descending=True).tolist()
        assert [p['label'] for p in predictions] == [LABELS[p['index']] for p in predictions]
        probabilities = torch.tensor([p['probability'] for p in predictions])
        torch.testing.assert_close(probabilities, expected.sort(descending=True).values)


def test_topk_is_clipped_to_the_number_of_classes(capsys, model, images):
    for topk, expected in (1, 1), (2, 2), (99, 3):
        _, found, _ = run_json(capsys, images / 'a.jpg', '--model', model, '--topk', topk)
        assert len(found[0]['predictions']) == expected


@pytest.mark.parametrize('topk', ['0', '-1', '2.5', 'five', ''])
def test_topk_must_be_a_positive_number(capsys, topk):
    with pytest.raises(SystemExit) as e:
        main(['predict', '--topk', topk])
    assert e.value.code == 2
    assert f'must be an integer of at least 1, got {topk!r}' in capsys.readouterr().err


def write_bomb(path):
    """Writes a PNG whose header claims 1.6 billion pixels."""
    with open(path, 'wb') as f:
        f.write(b'\x89PNG\r\n\x1a\n')
        PngImagePlugin.putchunk(f, b'IHDR', (40000).to_bytes(4, 'big') * 2 + b'\x08\x02\0\0\0')
        PngImagePlugin.putchunk(f, b'IEND', b'')


BAD = {
    'missing.jpg': (lambda path: None, 'No such file'),
    'text.jpg': (lambda path: path.write_text('no image'), 'not an image'),
    'empty.png': (lambda path: path.touch(), 'not an image'),
    'truncated.jpg': (
        lambda path: path.write_bytes((predict.PHOTOS / 'cat.jpg').read_bytes()[:9000]),
        'cannot be read: image file is truncated',
    ),
    'corrupt.png': (
        lambda path: path.write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + b'\xff' * 40),
        'not an image|cannot be read',
    ),
    'bomb.png': (write_bomb, 'decompression bomb'),
    'deep.png': (lambda path: Image.new('I;16', (40, 40), 30000).save(path), 'not supported. .* 8 bits'),
    'folder': (lambda path: path.mkdir(), r'no image in this folder.*\.jpg'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_file_that_cannot_be_read_ends_in_one_line(capsys, model, tmp_path, name):
    write, reason = BAD[name]
    path = tmp_path / name
    write(path)
    code, out, err = run(capsys, 'predict', path, '--model', model)
    assert (code, out) == (2, '')
    assert re.fullmatch(f'timm-sknet: {re.escape(str(path))}: .*({reason}).*\n', err)


def test_bad_files_are_named_and_the_others_classified(capsys, model, images):
    for name in BAD:
        BAD[name][0](images / name)
    code, found, err = run_json(capsys, images, images / 'missing.jpg', images / 'folder', '--model', model)
    assert code == 1
    assert len(found) == 5
    assert sorted(Path(line.split(': ')[1]).name for line in err.splitlines()) == sorted(BAD)


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('sknet5', ['Unknown model', 'sknet50,', 'sknet26']),
        ('SKNet50.ra_in1k', ['sknet50.ra_in1k']),
        ('sknet50.no_such_tag', ['no_such_tag', 'sknet50']),
        ('zzzzzzzz', ['Unknown model']),
        ('sknet26', ['no public weights of sknet26', 'sknet12.cifar10']),
        ('local-dir:/no/such/folder', ['/no/such/folder']),
        ('hf-hub:', ['hf-hub:']),
        (
            'hf-hub:timm-sknet/no-such-model',
            ['be reached', 'leave out --model', 'HF_HUB_OFFLINE=1', 'local-dir:'],
        ),
        ('sknet50', ['cannot be reached', 'sknet50']),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_in_one_line(capsys, monkeypatch, tmp_path, name, words):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)  # avoids 23 s of retries
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    code, out, err = run(capsys, 'predict', '--model', name)
    assert (code, out) == (2, '')
    assert re.fullmatch('timm-sknet: .*\n', err)
    assert all(word in err for word in [name, *words])


def write_weights_of_another_network(folder):
    write_model(folder, 3)
    save_file({'weight': torch.zeros(1)}, folder / 'model.safetensors')


UNSUITABLE = {
    'weights of another network': (write_weights_of_another_network, 'Missing key'),
    'no classes': (lambda folder: write_model(folder, 0), ' has no classes to predict'),
    'four channels': (
        lambda folder: write_model(folder, 3, in_chans=4),
        ' 4 channels',
    ),
}


@pytest.mark.parametrize('name', UNSUITABLE)
def test_a_model_that_cannot_predict_ends_in_one_line(capsys, tmp_path, name):
    write, reason = UNSUITABLE[name]
    write(tmp_path)
    code, out, err = run(capsys, 'predict', '--model', f'local-dir:{tmp_path}')
    assert (code, out) == (2, '')
    assert re.fullmatch(f'timm-sknet: .*{reason}.*\n', err)


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_shown_for_many_images_on_a_terminal_only(capsys, monkeypatch, model, images, terminal):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal)
    many = [images / 'a.jpg'] * (predict.BATCH_SIZE + 1)
    code, found, err = run_json(capsys, *many, '--model', model)
    assert (code, len(found)) == (0, len(many))
    assert ('image/s' in err) == terminal
    assert terminal or not err
    assert run(capsys, 'predict', *many[:3], '--model', model)[2] == ''


@pytest.mark.parametrize('device', ['cuda:99', 'no-device'])
def test_a_device_that_is_not_available_ends_in_one_line(capsys, model, device):
    code, out, err = run(capsys, 'predict', '--model', model, '--device', device)
    assert (code, out) == (2, '')
    assert re.fullmatch(f"timm-sknet: Device '{device}' cannot be used: .*Use --device cpu.\n", err)


def test_links_and_folders_that_cannot_be_read_are_named(capsys, model, images):
    (images / 'class').symlink_to('nowhere')
    code, found, err = run_json(capsys, images, '--model', model)
    assert (code, len(found)) == (1, 5)
    assert err == f'timm-sknet: {images}/class: broken link: No such file or directory\n'


def test_orientation_and_transparency_change_predictions(capsys, model, tmp_path):
    picture = Image.open(predict.PHOTOS / 'horse.jpg').convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / 'a.png')
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'b.png', exif=exif)
    picture.putalpha(0)
    picture.save(tmp_path / 'c.png')
    Image.new('RGB', picture.size, 'white').save(tmp_path / 'd.png')
    code, found, err = run_json(capsys, tmp_path, '--model', model)
    assert (code, err) == (0, '')
    upright, turned, transparent, white = (result['predictions'] for result in found)
    assert upright == turned and transparent == white and upright != white


def test_large_photographs_are_classified_without_a_warning(capsys, monkeypatch, model, recwarn):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)  # the photographs have more pixels
    code, _, err = run(capsys, 'predict', '--model', model)
    assert (code, err, list(recwarn)) == (0, '', [])


def test_help_says_where_the_preprocessing_differs_from_timms(capsys):
    for command in 'predict', 'attention':
        with pytest.raises(SystemExit):
            main([command, '--help'])
        said = ' '.join(capsys.readouterr().out.split())
        assert 'EXIF orientation' in said and 'transparent pixels become white' in said and 'validate.py' in said


def test_ctrl_c_leaves_no_traceback(capsys, monkeypatch):
    def interrupt(name, device):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_sknet.cli.load_model', interrupt)
    assert run(capsys, 'predict') == (130, '', '')


@pytest.fixture
def stdout(monkeypatch):
    """Replaces stdout by a file on a full disk, without a buffer, with one, or by None, which is a closed stream."""

    def replace(kind):
        buffering = {'full': -1, 'full without buffer': 1}.get(kind)
        monkeypatch.setattr(sys, 'stdout', buffering and open('/dev/full', 'w', buffering))

    return replace


full_disk = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='There is no /dev/full.')
UNWRITABLE = {'full': 'No space left on device', 'full without buffer': 'No space left on device', 'closed': 'closed'}


@full_disk
@pytest.mark.parametrize('kind', UNWRITABLE)
@pytest.mark.parametrize('command', ['predict', 'predict --json', 'models', 'recipe'])
def test_output_that_cannot_be_written_ends_in_one_line(capfd, stdout, monkeypatch, model, command, kind):
    monkeypatch.setattr('timm_sknet.cli.model_table', list)
    stdout(kind)
    assert main([*command.split(), *(['--model', model] if 'predict' in command else [])]) == 2
    assert re.fullmatch(
        f'timm-sknet: Cannot write to standard output: .*{UNWRITABLE[kind]}.*\n', capfd.readouterr().err
    )


@full_disk
@pytest.mark.parametrize('kind', UNWRITABLE)
def test_a_line_of_success_that_cannot_be_written_does_not_change_the_success(capfd, stdout, tmp_path, kind):
    weights = Path(timm_sknet.__file__).parent / 'weights' / 'sknet12.cifar10.safetensors'
    for argv in (
        ['convert', weights, tmp_path / 'folder', '--arch', 'sknet12'],
        ['attention', predict.PHOTOS / 'cat.jpg', '--out', tmp_path / 'figure.png'],
    ):
        stdout(kind)
        assert (main(list(map(str, argv))), capfd.readouterr().err) == (0, '')
    assert (tmp_path / 'folder' / 'config.json').is_file() and (tmp_path / 'figure.png').is_file()


@full_disk
@pytest.mark.parametrize('redirection', ['>&-', '>/dev/full 2>/dev/full'])
def test_a_process_with_streams_that_cannot_be_written_ends_with_exit_code_2(redirection):
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    command = f'"$0" -m timm_sknet recipe {redirection}'
    done = subprocess.run(['sh', '-c', command, sys.executable], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == ('2>' not in redirection)


@pytest.mark.parametrize(
    'encoding, expected', [('ascii', '\\u732b \\xe9'), ('latin-1', '\\u732b é'), ('utf-8', '猫 é')]
)
def test_letters_that_the_encoding_lacks_are_escaped(monkeypatch, tmp_path, encoding, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, 'stdout', stream)
    model = write_model(tmp_path, 1, ['猫 é'])
    (tmp_path / '猫 é.jpg').write_bytes((predict.PHOTOS / 'cat.jpg').read_bytes())
    assert main(['predict', str(tmp_path), '--model', model]) == 0
    assert stream.buffer.getvalue().decode(encoding) == f'{tmp_path}/{expected}.jpg\n  100.0%  {expected}\n'
    assert stream.errors == 'strict'


def test_the_command_runs_in_a_thread(capsys, model):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ['predict', '--model', model, '--batch-size', '1', '--workers', '1']).result() == 0
    assert len(re.findall(r'\.jpg\n', capsys.readouterr().out)) == len(ANSWERS)


def test_a_closed_pipe_leaves_no_traceback(model):
    command = [sys.executable, '-m', 'timm_sknet', 'predict', '--model', model]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b'', 141)


def test_a_separate_process_names_the_error_and_fails():
    command = [sys.executable, '-m', 'timm_sknet', 'predict', '--model', 'hf-hub:timm-sknet/no-such-model']
    done = subprocess.run(command, env=os.environ | {'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert re.fullmatch('timm-sknet: The Hub cannot be reached.*\n', done.stderr)


def test_a_file_name_that_is_not_text_can_be_printed(capsys, model, tmp_path):
    name = os.fsdecode(b'\xff.png')
    Image.new('RGB', (32, 32)).save(tmp_path / name)
    code, out, _ = run(capsys, 'predict', tmp_path / name, '--model', model)
    assert code == 0
    assert '\\udcff.png\n' in out
    _, out, _ = run(capsys, 'predict', '--json', tmp_path / name, '--model', model)
    assert json.loads(out)[0]['file'] == str(tmp_path / name)


def test_version_and_help(capsys):
    for argv, expected in (['--version'], timm_sknet.__version__), (['predict', '--help'], 'Exit code: 0'):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_table_of_models_is_printed(capsys):
    code, out, _ = run(capsys, 'models')
    assert code == 0
    figures = (
        r'^sknet50\.ra_in1k +27,479,784 +4.463 +224x224 +80.168 +apache-2.0 +https://huggingface.co/timm/skresnext50'
    )
    assert re.search(figures, out, re.MULTILINE)


def test_a_model_that_fails_on_the_images_ends_in_one_line(capsys, monkeypatch, model):
    monkeypatch.setattr('timm_sknet.network.SKNet.forward', lambda self, x: 1 / 0)
    code, out, err = run(capsys, 'predict', '--model', model)
    assert (code, out) == (2, '')
    assert re.fullmatch('timm-sknet: .*ZeroDivisionError.*\n', err)


def test_a_model_that_fails_in_a_worker_ends_in_one_line(capsys, monkeypatch, model):
    monkeypatch.setattr('timm_sknet.network.SKNet.forward', lambda self, x: 1 / 0)
    code, out, err = run(capsys, 'predict', '--model', model, '--workers', 1)
    assert (code, out) == (2, '')
    assert re.fullmatch('timm-sknet: Model .* failed on the images: ZeroDivisionError: division by zero\n', err)


def test_recipes_are_listed_and_found(capsys):
    code, out, _ = run(capsys, 'recipe')
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and {'imagenet', 'cifar', 'finetune', 'sknet12_cifar10'} <= set(names)
    for name, line in zip(names, out.splitlines()):
        code, path, _ = run(capsys, 'recipe', name)
        assert code == 0 and Path(path.strip()).is_file() and line.endswith('.') and len(line) < 120
    code, out, err = run(capsys, 'recipe', 'resnet')
    assert (code, out) == (2, '') and "no recipe 'resnet'. Choose one of cifar, " in err
