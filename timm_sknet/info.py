"""Describes the installation for bug reports: the work of `timm-sknet info`."""

import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from typing import Dict, List

import huggingface_hub
import safetensors
import timm
import torch
from huggingface_hub import constants

import timm_sknet
from timm_sknet.sknets import model_cfgs

PACKAGES = torch, timm, huggingface_hub, safetensors, timm_sknet
SWITCHES = 'TIMM_SKNET_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'
# Runs in a new process, because this process has imported timm_sknet.
OWNERS = """
import json, sys
sys.path = [path for path in sys.path if path]  # as in scripts: without the current folder
import timm
names = filter(timm.is_model, sys.argv[1:])
print(json.dumps({name: timm.models.model_entrypoint(name).__module__ for name in names}))
"""


def info() -> Dict[str, str]:
    """Returns versions, the state of the registration and the settings of the Hub, by what they describe."""
    found = {'Python': f'{platform.python_version()}, {platform.platform()}'}
    found |= {package.__name__: package.__version__ for package in PACKAGES}
    found |= _registration()
    found['cache'] = constants.HF_HUB_CACHE
    found['Hub'] = constants.ENDPOINT + (', offline (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else ', online')
    return found


def _registration() -> Dict[str, str]:
    """Returns whether the autoload is on, and which modules have our names in a process that imports only timm."""
    off = [f'{name}=0' for name in SWITCHES if os.environ.get(name) == '0']
    autoload = f'off ({", ".join(off)})' if off else 'on'
    done = subprocess.run([sys.executable, '-c', OWNERS, *model_cfgs], capture_output=True, text=True)
    if done.returncode:
        return {'autoload': autoload, 'models': f'`import timm` failed: {_last_line(done.stderr)}'}
    names: Dict[str, List[str]] = defaultdict(list)
    for name, module in json.loads(done.stdout).items():
        names[module].append(name)
    ours = len(names.pop('timm_sknet.sknets', ()))
    if not off:
        autoload += ', has registered' if ours else ', has not registered'
    models = [f'{ours} of {len(model_cfgs)} are ours']
    models += [f'{", ".join(theirs)}: registered by {module}' for module, theirs in names.items()]
    warned = [line for line in done.stderr.splitlines() if 'timm_sknet could not register' in line]
    return {'autoload': '; '.join([autoload, *warned]), 'models': '; '.join(models)}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ['no message'])[-1]
