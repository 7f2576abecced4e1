"""The networks that the benchmarks compare. Implementations of the same network get the same weights."""

import importlib
import importlib.util
import re
from functools import partial
from typing import Any, Callable, Dict, List

import timm
import torch
import torch.fx.experimental.optimization
from timm.utils import reparameterize_model
from torch import nn

from timm_sknet.keys import native_keys
from timm_sknet.network import Bottleneck
from timm_sknet.sknets import model_cfgs


def ours(name: str, **kwargs: Any) -> nn.Module:
    """Returns a model of timm_sknet with fixed random weights and statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
        if isinstance(m, Bottleneck):
            nn.init.constant_(m.conv3.bn.weight, 0.2)  # otherwise, a hundred layers amplify rounding errors
    return model


def one_branch(name: str) -> nn.Module:
    """Returns the same network with only its 3x3 branch (M = 1)."""
    return timm.create_model(name, branches=[branch for branch in model_cfgs[name].branches if branch[:2] == (3, 1)])


def timm_sk(name: str) -> nn.Module:
    """Returns timm's own SK network of the same depth with our weights."""
    model = ours(name)
    theirs = timm.create_model(TIMM_SK[name], layers=tuple(len(stage) for stage in model.stages))
    state = model.state_dict()
    names = native_keys({key: key for key in theirs.state_dict()})  # timm's keys by our keys
    theirs.load_state_dict({their_key: state[our_key] for our_key, their_key in names.items()})
    return theirs


def pytorchcv_sk(name: str) -> nn.Module:
    """Returns pytorchcv's SKNet with our weights. Its modules have our order, except for the shortcut."""
    theirs = importlib.import_module('pytorchcv.model_provider').get_model(name)
    theirs.features.final_pool = nn.AdaptiveAvgPool2d(1)  # for any image size
    unit_last = sorted(ours(name).state_dict().items(), key=lambda item: _unit(item[0]))
    theirs.load_state_dict(dict(zip(theirs.state_dict(), (value for _, value in unit_last), strict=True)))
    return theirs


def _unit(key: str) -> List[int]:
    part = ['stem', 'stages', 'head'].index(key.split('.')[0])
    return [part, *map(int, re.findall(r'^stages\.(\d+)\.(\d+)', key)[0] if part == 1 else ()), '.shortcut.' in key]


def pylocron_sk(name: str) -> nn.Module:
    """Returns Holocron's SKNet, a different network: sigmoid before the softmax, wider attention, 35M parameters."""
    return getattr(importlib.import_module('holocron.models'), name)()


def folded(model: nn.Module) -> nn.Module:
    """Folds the batch norms of a model. Models without `reparameterize` are folded by torch.fx."""
    model = reparameterize_model(model.eval())
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model = torch.fx.experimental.optimization.fuse(model)
    return model


MEMORY_EFFICIENT = 'timm_sknet memory-efficient'  # differs from timm_sknet only in training
RESNEXT = {'sknet50': 'resnext50_32x4d', 'sknet101': 'resnext101_32x4d'}
TIMM_SK = {
    'sknet50': 'skresnext50_32x4d',
    'sknet101': 'skresnext50_32x4d',
    'sk_resnet18_timm': 'skresnet18',
    'sk_resnet34_timm': 'skresnet34',
}
Contender = Callable[[], nn.Module]


def contenders(name: str) -> Dict[str, Contender]:
    """Returns functions that create the networks to compare with a model, and the model itself."""
    found: Dict[str, Contender] = {
        'timm_sknet': partial(ours, name),
        'attention-free': partial(ours, name, attention=False),
    }
    if name in RESNEXT:
        found['timm ResNeXt'] = partial(timm.create_model, RESNEXT[name])
    else:
        found['one branch'] = partial(one_branch, name)
    if name in TIMM_SK:
        found['timm SK'] = partial(timm_sk, name)
    found[MEMORY_EFFICIENT] = partial(ours, name, memory_efficient=True)
    for package, peer in ('pytorchcv', pytorchcv_sk), ('holocron', pylocron_sk):
        if name == 'sknet50' and importlib.util.find_spec(package):
            found[package] = partial(peer, name)
    return found
