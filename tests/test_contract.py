"""Processes that import only timm, and timm's scripts, with our models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import hub
from PIL import Image
from versions import since

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS', 'missing'))
needs_scripts = pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ,
    reason="set TIMM_SCRIPTS to a folder with timm's scripts, which are in its repository but not in its package",
)
needs_train = since('timm', '1.0.27', 'train.py resumes with resume_task_checkpoint')
CLASSES = ('cat', 'dog', 'frog')
CPU = ('--device', 'cpu')
ANY_PROCESS = """
import sys
import timm, timm.optim, torch
assert 'timm_sknet' in sys.modules and sys.argv[1:] == [], 'the entry point registers'
model = timm.create_model('sknet12', num_classes=3)
optimizer = timm.optim.create_optimizer_v2(model, opt='sgd', lr=0.01)
x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
before = torch.nn.functional.cross_entropy(model(x), y)
before.backward()
optimizer.step()
assert torch.nn.functional.cross_entropy(model(x), y) < before
model.eval()
with torch.no_grad():
    logits = model(x)
assert logits.shape == (4, 3) and logits.isfinite().all()
exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},)).module()
torch.testing.assert_close(exported(x[:3]), logits[:3], rtol=1e-4, atol=1e-4)
"""


def python(*arguments, cwd, **env):
    run = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    return run.stdout + run.stderr


def test_a_process_that_imports_timm_alone_trains_validates_and_exports(tmp_path):
    python('-c', ANY_PROCESS, cwd=tmp_path)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Class folders of noise images, each class in its own colour: eight images per class in train/, four in val/."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, number in ('train', 8), ('val', 4):
        for i, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for j in range(number):
                pixels = rng.integers(0, 80, (40, 40, 3)) + np.eye(3, dtype=int)[i] * 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f'{name}{j}.png')
    return folder


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """The output folder of train.py: one epoch, and a second epoch resumed from its checkpoint."""
    assert not (SCRIPTS / 'timm').exists(), f'{SCRIPTS} must not contain the package timm'
    out = tmp_path_factory.mktemp('train')
    recipe = python('-m', 'timm_sknet', 'recipe', 'sknet12_cifar10', cwd=out).strip()
    run = [
        *(SCRIPTS / 'train.py', '-c', recipe, '--data-dir', images, *CPU, '--num-classes', 3, '-b', 6, '--output', out),
        *('--experiment', 'run', '--grad-checkpointing', '--layer-decay', 0.9, '--model-ema', '--channels-last'),
        *('--val-interval', 1, '--model-kwargs', 'branches=[[3,1,1],[3,3,1]]', '--warmup-epochs', 0),
    ]
    python(*run, '--epochs', 1, cwd=out)
    log = python(*run, '--epochs', 2, '--resume', out / 'run' / 'last.pth.tar', cwd=out)
    assert 'Train: 1 ' in log and 'Train: 0 ' not in log
    return out / 'run'


@needs_scripts
@needs_train
@pytest.mark.slow
def test_train_keeps_checkpoints_and_figures(trained):
    lines = (trained / 'summary.csv').read_text().splitlines()
    assert lines[0].startswith('epoch,train_loss,eval_loss,eval_top1')
    assert [line[:2] for line in lines if line[0].isdigit()] == ['0,', '1,']
    state = torch.load(trained / 'last.pth.tar', weights_only=False)  # safe: written by this test
    assert state['epoch'] == 1 and state['arch'] == 'sknet12'
    assert state['state_dict'].keys() == state['state_dict_ema'].keys()
    assert 'stages.2.1.sk.branches.1.conv.weight' in state['state_dict']


@needs_scripts
@needs_train
@pytest.mark.slow
@pytest.mark.parametrize(
    'recipe, options',
    [
        ('imagenet', ('--model', 'sknet26', '--img-size', 64)),
        ('imagenet', ('--img-size', 64)),
        ('imagenet', ('--model', 'sknet101', '--img-size', 64)),
        ('imagenet_light', ('--img-size', 64)),
        ('imagenet_light', ('--model', 'sk_shufflenetv2_x0_5', '--img-size', 64)),
        ('cifar', ('--num-classes', 100)),
        ('cifar_modern', ('--num-classes', 10)),
        ('finetune', ('--num-classes', 3, '--img-size', 64)),
        ('sknet14_imagenette128', ()),
    ],
    ids=lambda value: value if isinstance(value, str) else '_'.join(map(str, value[1::2])),
)
def test_train_takes_a_few_steps_of_each_recipe(recipe, options, images, repo, tmp_path):
    file = python('-m', 'timm_sknet', 'recipe', recipe, cwd=tmp_path).strip()
    arguments = ('-c', file, '--data-dir', images, *CPU, *options, '-b', 8, '--epochs', 1, '--workers', 1)
    with hub(repo) as address:  # serves the weights to fine-tune
        log = python(
            *(SCRIPTS / 'train.py', *arguments, '--warmup-epochs', 0, '--output', tmp_path, '--experiment', 'run'),
            cwd=tmp_path,
            HF_ENDPOINT=address,
            HF_HOME=str(tmp_path / 'cache'),
            HF_HUB_OFFLINE='0',
        )
    assert re.search(r'Train: 0 \[ +2/3 \(100%\)\] +Loss: [\d.]+ ', log)  # not nan


@needs_scripts
@needs_train
@pytest.mark.slow
def test_train_by_module_name_where_the_autoload_is_off(images, tmp_path):
    arguments = [
        *(SCRIPTS / 'train.py', '--model', 'sknet12', '--data-dir', images, *CPU, '--num-classes', 3, '-b', 6),
        *('--epochs', 1, '--bn-momentum', 0.2, '--bn-eps', 0.001, '--in-chans', 3, '--gp', 'max', '--workers', 1),
        *('--input-size', 3, 32, 32, '--output', tmp_path, '--experiment', 'run'),
    ]
    python(*arguments, '--device-modules', 'timm_sknet', cwd=tmp_path, TIMM_SKNET_AUTOLOAD='0')
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    log = python(*arguments, '--initial-checkpoint', checkpoint, cwd=tmp_path)
    assert 'Train: 0 ' in log
    refused = subprocess.run(
        [sys.executable, *map(str, arguments), '--drop-block', '0.1'], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode and 'TypeError' in refused.stderr and "'drop_block_rate'" in refused.stderr


@needs_scripts
@needs_train
@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        ('--reparam', '--channels-last', '--use-ema'),
        ('--amp', '--amp-dtype', 'bfloat16', '--gp', 'fast'),
        ('--torchcompile', 'aot_eager'),
    ],
    ids='_'.join,
)
def test_validate_a_checkpoint(trained, images, options):
    log = python(
        *(SCRIPTS / 'validate.py', '--model', 'sknet12', '--num-classes', 3, '--data-dir', images, '-b', 4, *CPU),
        *('--checkpoint', trained / 'last.pth.tar', '--model-kwargs', 'branches=[[3,1,1],[3,3,1]]', *options),
        cwd=trained,
    )
    assert '"top1"' in log


@needs_scripts
@needs_train
@pytest.mark.slow
def test_validate_a_converted_checkpoint(trained, images, tmp_path):
    python('-m', 'timm_sknet', 'convert', trained / 'last.pth.tar', 'out', '--arch', 'sknet12', cwd=tmp_path)
    options = ['--data-dir', images, '-b', 4, *CPU]
    checkpoint = ['--checkpoint', trained / 'last.pth.tar', '--use-ema', '--num-classes', 3]
    branches = ['--model-kwargs', 'branches=[[3,1,1],[3,3,1]]']
    losses = []
    for model in ['sknet12', *checkpoint, *branches], ['local-dir:out']:
        log = python(SCRIPTS / 'validate.py', '--model', *model, *options, cwd=tmp_path)
        losses.append(re.findall(r'Loss: +[0-9.]+ +\(([0-9.]+)\)', log)[-1])
    assert losses[0] == losses[1]


@needs_scripts
@pytest.mark.slow
def test_validate_the_embedded_weights_and_a_folder_of_timms(images, tmp_path):
    save = (
        'import timm; from timm.models import save_for_hf; '
        "save_for_hf(timm.create_model('sknet12', pretrained=True, num_classes=3, branches=[[3,1,1],[3,2,1]]), 'saved')"
    )
    python('-c', save, cwd=tmp_path)
    for model in 'sknet12.cifar10', f'local-dir:{tmp_path / "saved"}':
        log = python(
            *(SCRIPTS / 'validate.py', '--model', model, '--num-classes', 3, '--data-dir', images, *CPU, '-b', 4),
            cwd=tmp_path,
        )
        assert '"param_count": 0.46' in log


@needs_scripts
@pytest.mark.slow
def test_inference_writes_the_classes_of_the_embedded_weights(images, tmp_path):
    python(
        *(SCRIPTS / 'inference.py', '--model', 'sknet12', '--data-dir', images / 'val', *CPU, '-b', 4, '--topk', 2),
        *('--results-dir', tmp_path, '--results-file', 'out.csv'),
        cwd=tmp_path,
    )
    assert len((tmp_path / 'out.csv').read_text().splitlines()) == 1 + 3 * 4


@needs_scripts
@pytest.mark.slow
@pytest.mark.parametrize('bench', ['infer', 'train'])
def test_benchmark(tmp_path, bench):
    log = python(
        *(SCRIPTS / 'benchmark.py', '--model', 'sknet12', '-b', 2, *CPU, '--num-bench-iter', 10, '--num-warm-iter', 1),
        *('--bench', bench, '--channels-last', '--gp', 'fast', '--torchcompile', 'aot_eager'),
        *(['--reparam'] if bench == 'infer' else []),
        cwd=tmp_path,
    )
    assert f'"{bench}_samples_per_sec"' in log


@needs_scripts
@pytest.mark.slow
@pytest.mark.parametrize(
    'exporter',
    [(), pytest.param(('--dynamo',), marks=since('torch', '2.7', 'onnxscript has dropped the exporter of torch 2.6'))],
    ids=['trace', 'dynamo'],
)
def test_onnx_export_gives_the_models_own_logits(tmp_path, exporter):
    import onnxruntime
    import timm

    python(SCRIPTS / 'onnx_export.py', 'out.onnx', '--model', 'sknet12', '--reparam', *exporter, cwd=tmp_path)
    x = torch.randn(1, 3, 32, 32)
    session = onnxruntime.InferenceSession(tmp_path / 'out.onnx', providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = timm.create_model('sknet12', pretrained=True).eval()(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
