"""Other packages that use timm models: one short example for each, as a user would write it.

The extra `ecosystem` lists these packages. The table of integrations in the documentation links to these tests.
"""

import copy
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.export import Dim
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from versions import since

import timm_sknet
from timm_sknet.cli import main
from timm_sknet.sknets import default_cfgs

PHOTOS = Path(timm_sknet.__file__).parent / 'photos'
INT8 = Path(__file__).parents[1] / 'benchmarks' / 'int8.py'


def need(name):
    """Imports a package. Without it, the test is skipped, unless REQUIRE_ECOSYSTEM is set."""
    return importlib.import_module(name) if os.environ.get('REQUIRE_ECOSYSTEM') else pytest.importorskip(name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The embedded weights, converted by `timm-sknet convert` with their class names."""
    cfg = default_cfgs['sknet12'].default
    out = tmp_path_factory.mktemp('converted')
    (out / 'names.txt').write_text('\n'.join(cfg.label_names))
    names = ['--label-names', str(out / 'names.txt')]
    assert main(['convert', cfg.file, str(out / 'sknet12'), '--arch', 'sknet12', *names]) == 0
    return str(out / 'sknet12')


@pytest.fixture
def two_classes():
    """Images of noise and their classes. The images of class 1 are brighter."""
    y = torch.arange(16) % 2
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + y[:, None, None, None], y


def embedded(**kwargs):
    return timm.create_model('sknet12.cifar10', pretrained=True, **kwargs).eval()


def has_gradients(model):
    return all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# transformers


@torch.no_grad()
def test_transformers_image_classification(folder):
    transformers = need('transformers')
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x).logits, embedded()(x))


@torch.no_grad()
def test_transformers_pipeline(folder):
    transformers = need('transformers')
    classify = transformers.pipeline('image-classification', folder)
    best = classify(str(PHOTOS / 'horse.jpg'))[0]
    assert best['label'] == 'horse'

    model = embedded()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    x = transform(Image.open(PHOTOS / 'horse.jpg').convert('RGB')).unsqueeze(0)
    assert best['score'] == pytest.approx(model(x).softmax(-1).max().item(), abs=1e-5)


@pytest.mark.parametrize('source', ['name', 'folder'])
@torch.no_grad()
def test_transformers_timm_backbone(folder, source):
    transformers = need('transformers')
    initialization = need('transformers.initialization')
    name = 'sknet12.cifar10' if source == 'name' else f'local-dir:{folder}'
    with initialization.no_init_weights():  # initialising would reset the batch norm statistics
        backbone = transformers.TimmBackbone.from_pretrained(name, out_indices=(0, 1, 2)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(list(backbone(x).feature_maps), embedded(features_only=True)(x))
    assert backbone.channels == [16, 32, 96]


@torch.no_grad()
def test_transformers_timm_backbone_with_an_output_stride():
    transformers = need('transformers')
    config = transformers.TimmBackboneConfig(backbone='sknet26', out_indices=(3, 4), output_stride=16)
    maps = transformers.TimmBackbone(config).eval()(torch.randn(1, 3, 64, 64)).feature_maps
    assert [m.shape[1:] for m in maps] == [(1024, 4, 4), (2048, 4, 4)]


def test_transformers_trainer_on_a_converted_folder(folder, two_classes, tmp_path):
    need('accelerate')  # required by Trainer
    transformers = need('transformers')
    transformers.set_seed(0)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        tmp_path,
        max_steps=10,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        logging_steps=1,
        use_cpu=True,
        report_to='none',
        save_strategy='no',
    )
    images = [{'pixel_values': x, 'labels': y} for x, y in zip(*two_classes)]
    trainer = transformers.Trainer(model, args, train_dataset=images)
    trainer.train()
    losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
    assert len(losses) == 10 and losses[-1] < losses[0] / 2
    assert all((p != before[name]).any() for name, p in model.named_parameters())


# Segmentation and detection


@pytest.mark.parametrize(
    ('decoder', 'strides'), [('Unet', [1, 2, 4, 8, 16, 32]), ('DeepLabV3Plus', [1, 2, 4, 8, 16, 16])]
)
def test_segmentation_models_pytorch(decoder, strides):
    smp = need('segmentation_models_pytorch')
    stride = {'encoder_output_stride': 16} if decoder == 'DeepLabV3Plus' else {}
    model = getattr(smp, decoder)('tu-sknet50', encoder_weights=None, classes=2, **stride)
    x = torch.randn(2, 3, 64, 64)
    assert [64 // m.shape[3] for m in model.encoder(x)] == strides
    masks = model(x)
    assert masks.shape == (2, 2, 64, 64)
    cross_entropy(masks, torch.randint(2, (2, 64, 64))).backward()
    assert has_gradients(model)


def test_segmentation_with_a_network_for_small_images():
    smp = need('segmentation_models_pytorch')
    model = smp.Unet('tu-sknet12', encoder_weights=None, encoder_depth=2, decoder_channels=(32, 16), classes=2)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2, 32, 32)


def test_torchvision_detection():
    from torchvision.models.detection import FasterRCNN
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

    class Backbone(nn.Module):
        out_channels = 64

        def __init__(self):
            super().__init__()
            body = timm.create_model('sknet26', features_only=True, out_indices=(1, 2, 3, 4))
            self.body = timm.layers.freeze_batch_norm_2d(body)  # detectors train with batches of one or two images
            channels = body.feature_info.channels()
            self.fpn = FeaturePyramidNetwork(channels, self.out_channels, extra_blocks=LastLevelMaxPool())

        def forward(self, x):
            return self.fpn({str(i): m for i, m in enumerate(self.body(x))})

    torch.manual_seed(0)
    detector = FasterRCNN(Backbone(), num_classes=2, min_size=128, max_size=128)
    image, box = torch.rand(3, 128, 128), torch.tensor([[20.0, 30.0, 90.0, 100.0]])
    losses = detector([image], [{'boxes': box, 'labels': torch.tensor([1])}])
    sum(losses.values()).backward()
    assert len(losses) == 4 and has_gradients(detector.backbone)
    assert detector.eval()([image])[0]['boxes'].shape[1] == 4


# Training


def test_fastai_vision_learner(tmp_path):
    need('fastai')
    from fastai.vision.all import ImageDataLoaders, vision_learner

    rng = np.random.default_rng(0)
    for i, name in enumerate(('dark', 'bright')):
        (tmp_path / name).mkdir()
        for j in range(16):
            pixels = rng.integers(0, 80, (32, 32, 3)) + 150 * i
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f'{j}.png')
    loaders = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.25, seed=0, bs=8, num_workers=0, device='cpu')

    torch.manual_seed(0)
    learner = vision_learner(loaders, 'sknet12')  # loads the embedded weights, with their mean and std
    with learner.no_bar(), learner.no_logging():
        untrained = learner.validate()[0]
        learner.fine_tune(5, 3e-3)
        assert learner.validate()[0] < untrained / 2


@torch.no_grad()
def test_fastai_cuts_the_body():
    learner = need('fastai.vision.learner')
    body = learner.create_body(embedded(), pretrained=False).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(body(x), embedded().forward_features(x))


def test_lightning_training_step(two_classes, tmp_path):
    lightning = need('lightning')
    losses = []

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('sknet12', num_classes=2)

        def training_step(self, batch, _):
            x, y = batch
            loss = cross_entropy(self.model(x), y)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    torch.manual_seed(0)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator='cpu', max_epochs=10, default_root_dir=tmp_path, **quiet)
    trainer.fit(Classifier(), DataLoader(TensorDataset(*two_classes), batch_size=16))
    assert len(losses) == 10 and losses[-1] < losses[0] / 2


TRAIN = """
import sys
import timm, torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

distributed.init_process_group('gloo')
rank = distributed.get_rank()
torch.manual_seed(rank)  # DDP copies the weights of the first process to all others
model = timm.create_model('sknet12', num_classes=2, memory_efficient=sys.argv[1] == 'True')
parallel = DistributedDataParallel(model)
x, y = (t.chunk(2)[rank] for t in torch.load('batch.pt', weights_only=True))

parallel.eval()  # with running statistics, batch norm does not depend on the batch
cross_entropy(parallel(x), y).backward()
gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
parallel.train()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(2):
    optimizer.step()
    optimizer.zero_grad()
    cross_entropy(parallel(x), y).backward()
torch.save({'gradients': gradients, 'weights': dict(model.named_parameters())}, f'{rank}.pt')
distributed.destroy_process_group()
"""


def in_two_processes(folder, script, argument, batch):
    """Runs a script with torchrun and returns what its processes saved."""
    torch.save(batch, folder / 'batch.pt')
    (folder / 'train.py').write_text(script)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    run = subprocess.run([*torchrun, 'train.py', argument], cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-5000:]
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('memory_efficient', [False, True])
def test_torchrun_gives_two_processes_the_gradients_of_one(two_classes, tmp_path, memory_efficient):
    first, second = in_two_processes(tmp_path, TRAIN, str(memory_efficient), two_classes)

    torch.manual_seed(0)
    model = timm.create_model('sknet12', num_classes=2).eval()
    x, y = two_classes
    cross_entropy(model(x), y).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(first['gradients'], whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first['weights'], second['weights'], rtol=0, atol=0)
    assert all((p != first['weights'][name]).any() for name, p in model.named_parameters())


SHARD = """
import sys
import timm, torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

mesh = init_device_mesh('cpu', (2,))
rank = distributed.get_rank()
torch.manual_seed(0)  # FSDP2 keeps the weights that each process has
model = timm.create_model('sknet12', num_classes=2)
if sys.argv[1] == 'frozen norms':
    timm.layers.freeze_batch_norm_2d(model)
else:
    model.eval()  # with running statistics, batch norm does not depend on the batch
if sys.argv[1] != 'whole':
    for stage in model.stages:
        for unit in stage:
            fully_shard(unit, mesh=mesh)
fully_shard(model, mesh=mesh)
x, y = (t.chunk(2)[rank] for t in torch.load('batch.pt', weights_only=True))
cross_entropy(model(x), y).backward()
gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
torch.save(gradients, f'{rank}.pt')
distributed.destroy_process_group()
"""


@since('torch', '2.15', 'FSDP2 of older releases does not run on CPUs; 2.8 does not, and none between was run')
@pytest.mark.parametrize('kind', ['whole', 'by unit', 'frozen norms'])
def test_fsdp2_gives_two_processes_the_gradients_of_one(two_classes, tmp_path, kind):
    first, second = in_two_processes(tmp_path, SHARD, kind, two_classes)

    torch.manual_seed(0)
    model = timm.create_model('sknet12', num_classes=2)
    if kind == 'frozen norms':
        timm.layers.freeze_batch_norm_2d(model)
    else:
        model.eval()
    x, y = two_classes
    cross_entropy(model(x), y).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_sync_batch_norm(two_classes):
    """With one process: with more processes, SyncBatchNorm requires GPUs."""
    plain = timm.create_model('sknet12', num_classes=2)
    synced = timm.layers.convert_sync_batchnorm(copy.deepcopy(plain))
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 23 and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    x, y = two_classes
    for model in plain, synced:
        cross_entropy(model(x), y).backward()
    torch.testing.assert_close(dict(synced.named_buffers()), dict(plain.named_buffers()))
    found, expected = ({name: p.grad for name, p in m.named_parameters()} for m in (synced, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_peft_lora_on_the_attention(two_classes):
    peft = need('peft')
    x, y = two_classes
    model = embedded()
    with torch.no_grad():
        expected = model(x)
    config = peft.LoraConfig(r=4, target_modules=r'.*\.attn\.fc[12]', modules_to_save=['head.fc'])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(x), expected)  # LoRA starts with a product of 0

    optimizer = torch.optim.AdamW(adapted.parameters(), 1e-2)
    for _ in range(2):  # the first step changes only one of the two factors
        optimizer.zero_grad()
        cross_entropy(adapted(x), y).backward()
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    units = sum(1 for name, _ in model.named_modules() if name.endswith('.attn'))
    assert len(trained) == 2 * 2 * units + 2  # two factors for each of fc1 and fc2; weight and bias of the classifier
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}

    adapted.eval()
    with torch.no_grad():
        found = adapted(x)
        merged = adapted.merge_and_unload()
        assert (found - expected).abs().max() > 0.1
        torch.testing.assert_close(merged(x), found, rtol=1e-4, atol=1e-4)


def test_opacus_with_group_norm(two_classes):
    opacus = need('opacus')
    torch.manual_seed(0)
    model = timm.create_model('sknet12', num_classes=2, norm_layer='groupnorm1')
    reference = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(*two_classes), batch_size=8)
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    x, y = two_classes
    cross_entropy(private(x), y).backward()
    cross_entropy(reference(x), y).backward()
    # opacus computes the gradient of each image; their mean is the usual gradient
    for p, expected in zip(private.parameters(), reference.parameters()):
        assert p.grad_sample.shape == (16, *p.shape)
        torch.testing.assert_close(p.grad_sample.mean(0), expected.grad, rtol=1e-3, atol=1e-5)
    optimizer.step()
    assert all((p != before).any() for p, before in zip(private.parameters(), reference.parameters()))


# Explanations


def test_grad_cam():
    cam = need('pytorch_grad_cam')
    model, x = embedded(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    target = cam.utils.model_targets.ClassifierOutputTarget(3)
    with cam.GradCAM(model=model, target_layers=[model.stages[-1]]) as grad_cam:
        found = torch.from_numpy(grad_cam(input_tensor=x, targets=[target, target]))

    maps = model.forward_features(x).detach().requires_grad_()
    model.forward_head(maps)[:, 3].sum().backward()
    weights = maps.grad.mean((2, 3), keepdim=True)
    expected = (weights * maps.detach()).sum(1).relu()
    expected = torch.nn.functional.interpolate(expected[:, None], (32, 32), mode='bilinear')[:, 0]
    expected = expected - expected.amin((1, 2), keepdim=True)
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# Graphs


MAX_POOL = since('torch', '2.9', 'the max pool of a network of dynamic size cannot be exported, also in timm')


@pytest.mark.parametrize('name', ['sknet12', pytest.param('sknet26', marks=[pytest.mark.slow, MAX_POOL])])
@torch.no_grad()
def test_torch_export_with_dynamic_batch_and_size(name):
    model = timm.create_model(name).eval()
    # at 32x32 the last map of a network with stride 32 has one pixel, which torch.export treats as a special case
    dynamic = {0: Dim('batch'), 2: Dim('height', min=33), 3: Dim('width', min=33)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(dynamic,)).module()
    for shape in (1, 3, 64, 64), (3, 3, 72, 40), (2, 3, 33, 33):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@since('torch', '2.7', 'the exporter of torch 2.6 fails with the batch norms of newer onnxscript')
@torch.no_grad()
def test_onnx_runtime_with_dynamic_batch_and_size(tmp_path):
    import onnxruntime

    model, file = embedded(), tmp_path / 'sknet12.onnx'
    dynamic = {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 32, 32),),
        file,
        dynamo=True,
        dynamic_shapes=(dynamic,),
        input_names=['x'],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for shape in (1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 48, 40):
        x = torch.randn(shape)
        (logits,) = session.run(None, {'x': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_with_dynamic_batch_and_size():
    torch._dynamo.reset()
    model = embedded()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in (2, 3, 32, 32), (5, 3, 32, 32), (3, 3, 48, 40):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_with_a_dynamic_batch(tmp_path):
    model = embedded()
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: Dim('batch')},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'sknet12.pt2'))
    compiled = torch._inductor.aoti_load_package(package)
    for batch in 1, 2, 5:
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


# int8


@pytest.mark.slow
@pytest.mark.parametrize('rounds', [0, 1], ids=['eager', 'compiled'])
def test_torchao_int8_convolutions_included(tmp_path, rounds):
    need('torchao')
    for name in 'bird', 'cat', 'deer', 'horse':
        for split in 'train', 'val':
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / 'photo.jpg').symlink_to(PHOTOS / f'{name}.jpg')
    command = [sys.executable, INT8, tmp_path, '--batch', '4', '--rounds', str(rounds)]
    # in its own process, because importing torchao changes inductor
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    assert '29 of 29 convolutions and linear layers in int8, 4 images' in run.stdout
    top1 = re.findall(r'^\| (?:float32|int8).*?\| ([\d.]+) \|', run.stdout, re.MULTILINE)
    assert top1 == ['100.00'] * (3 if rounds else 2), run.stdout
