"""The model card of a converted model: README.md of its folder, as the Hub shows it."""

import hashlib
from typing import Any, Dict, Optional

from huggingface_hub import ModelCardData

from timm_sknet import __version__
from timm_sknet.checkpoints.reading import Source
from timm_sknet.sknets import Weights, weights

REPOSITORY = 'ORG/NAME'  # `push` puts the name of the repository in its place
UNSTATED = 'unknown'  # the Hub's word
TEMPLATE = """\
# {name}

{description} Converted by timm_sknet {version} from {what}.

## Use

The model is in timm's registry once the plugin is installed; without it timm says "Unknown model ({arch})".

```
pip install .  # in a checkout of timm_sknet; there is no release on a package index yet
```

```python
import timm

model = timm.create_model('hf-hub:{repository}', pretrained=True).eval()  # or 'local-dir:FOLDER'
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
```

timm's scripts take the same names, as in `python validate.py --model hf-hub:{repository} --data-dir IMAGES`, and so
does transformers, without their prefix: `AutoModelForImageClassification.from_pretrained('{repository}')`.

## Details

| | |
|---|---|
{details}
{notes}
## Accuracy

{figures}

## Citation

```
@inproceedings{{li2019selective,
  title={{Selective Kernel Networks}},
  author={{Li, Xiang and Wang, Wenhai and Hu, Xiaolin and Yang, Jian}},
  booktitle={{IEEE Conference on Computer Vision and Pattern Recognition}},
  year={{2019}}
}}
```
"""
CAFFE_NOTES = """
The authors' network takes pixels of 0 to 255 in the order BGR, less their mean 104, 117, 123, which is that of the
SENet release (the authors' files do not state it). Here the order is in the first convolution and the rest in mean and
std, so that timm's ordinary pipeline gives the network that input. The authors state no crop and no interpolation: size
224, crop_pct and interpolation are our choice. For size 320 add `--img-size 320` to `validate.py`.
"""


def model_card(config: Dict[str, Any], source: Source, parameters: int, dtype: str, claimed: bool) -> str:
    """Returns the card, front matter included.

    Args:
        config: What config.json holds.
        source: Where the weights come from.
        parameters: Number of learnable parameters.
        dtype: What the weights are stored in.
        claimed: Whether the licence is that of the caller, and not the source's.
    """
    arch, cfg, args = config['architecture'], config['pretrained_cfg'], config['model_args']
    licence = cfg.get('license')
    name = f'{arch}.{cfg["tag"]}' if cfg.get('tag') else arch
    entry = weights.get(f'{arch}.{source.tag}')
    with source.path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    details = {
        'architecture': f'{arch} of timm_sknet' + ''.join(f', {key}={value}' for key, value in args.items()),
        'parameters': f'{parameters:,}, in {dtype}',
        'classes': config['num_classes'],
        'source': f'{_escape(source.path.name)}, sha256 {sha256}',
        'origin': cfg.get('origin_url'),
        'licence': _licence(licence, claimed),
        'input': ' x '.join(map(str, cfg['input_size'])) + f', crop_pct {cfg["crop_pct"]}, {cfg["interpolation"]}',
        'mean': ', '.join(f'{x:.6g}' for x in cfg['mean']),
        'std': ', '.join(f'{x:.6g}' for x in cfg['std']),
    }
    data = ModelCardData(
        license=licence or UNSTATED,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'transformers', 'selective-kernel-networks'],
        datasets=[entry.dataset] if entry and entry.dataset else None,
    )
    return f'---\n{data.to_yaml()}\n---\n' + TEMPLATE.format(
        name=name,
        description=cfg.get('description') or f'{arch}, a Selective Kernel Network.',
        version=__version__,
        what=source.what,
        arch=arch,
        repository=REPOSITORY,
        details='\n'.join(f'| {key} | {value} |' for key, value in details.items() if value),
        notes=CAFFE_NOTES if source.kind == 'caffe' else '',
        figures=_figures(entry, source),
    )


def _escape(text: str) -> str:
    """Returns a name that can be anything as it stands in a table."""
    return ''.join(c if c.isalnum() or c in ' ._-' else '?' for c in text)


def _licence(licence: Optional[str], claimed: bool) -> str:
    if claimed:
        return f'{licence}, as whoever made this folder claims (`--license`); the source was not asked'
    return f'{licence}, as the source states' if licence else 'no licence stated'


def _figures(entry: Optional[Weights], source: Source) -> str:
    lines = []
    if entry and entry.published:
        figure = f'top-1 {entry.published} % on {entry.dataset} at the size above'
        lines.append(f'- **published** for the weights of that name: {figure}')
        lines.append('- not measured here, and not checked whether this file is the one that was published')
    if source.measured:
        lines.append(f'- **measured** by train.py on the validation data of that training: {source.measured}')
    return '\n'.join(lines) or 'Not measured.'
