"""Writes the model card (README.md) of a converted model."""

from typing import Any, Dict, Optional

from huggingface_hub import ModelCardData

from timm_sknet import __version__
from timm_sknet.checkpoints.reading import Source
from timm_sknet.loading import sha256
from timm_sknet.sknets import Weights, default_cfgs, weights

REPOSITORY = 'ORG/NAME'  # `push` replaces it by the name of the repository
UNSTATED = 'unknown'  # what the Hub calls a licence that is not stated
TEMPLATE = """\
# {name}

{description} Converted with timm_sknet {version} from {what}.

## Use

Install timm_sknet first: it adds the model to timm's registry. Without it, timm reports "Unknown model ({arch})".

```
pip install .  # in a checkout of timm_sknet; there is no released package yet
```

```python
import timm

model = timm.create_model('hf-hub:{repository}', pretrained=True).eval()  # or 'local-dir:FOLDER'
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
```

timm's scripts accept the same name: `python validate.py --model hf-hub:{repository} --data-dir IMAGES`. In
transformers, leave out the prefix: `AutoModelForImageClassification.from_pretrained('{repository}')`.

## Details

| | |
|---|---|
{details}
{notes}
## Accuracy

{figures}

## Citation

```
{citation}
```
"""
CITATIONS = {
    'arXiv:1903.06586': """\
@inproceedings{li2019selective,
  title={Selective Kernel Networks},
  author={Li, Xiang and Wang, Wenhai and Hu, Xiaolin and Yang, Jian},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  year={2019}
}""",
    'arXiv:2006.10029': """\
@inproceedings{chen2020big,
  title={Big Self-Supervised Models are Strong Semi-Supervised Learners},
  author={Chen, Ting and Kornblith, Simon and Swersky, Kevin and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
}
CAFFE_NOTES = """
The authors' Caffe network expects BGR pixels from 0 to 255, from which the mean (104, 117, 123) is subtracted. The
authors' files do not state this mean: it is taken from the SENet release. In this model, the first convolution is
converted to RGB, and `mean` and `std` contain the rest. No special preprocessing is needed. The authors state neither
crop nor interpolation: the input size of 224, `crop_pct` and `interpolation` are our choice. To validate at size 320,
add `--img-size 320` to `validate.py`.
"""


def model_card(config: Dict[str, Any], source: Source, parameters: int, dtype: str, claimed: bool) -> str:
    """Returns the text of the model card, including its front matter.

    Args:
        config: The content of config.json.
        source: The source of the weights.
        parameters: Number of learnable parameters.
        dtype: Dtype of the stored weights.
        claimed: Whether the licence was given by the caller instead of the source.
    """
    arch, cfg, args = config['architecture'], config['pretrained_cfg'], config['model_args']
    licence = cfg.get('license')
    name = f'{arch}.{cfg["tag"]}' if cfg.get('tag') else arch
    entry = weights.get(f'{arch}.{source.tag}')
    details = {
        'architecture': f'{arch} of timm_sknet' + ''.join(f', {key}={value}' for key, value in args.items()),
        'parameters': f'{parameters:,}, in {dtype}',
        'classes': config['num_classes'],
        'source': f'{_escape(source.path.name)}, sha256 {sha256(source.path)}',
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
        citation=CITATIONS[default_cfgs[arch].default.paper_ids],
    )


def _escape(text: str) -> str:
    """Replaces the characters of a file name that could break a Markdown table."""
    return ''.join(c if c.isalnum() or c in ' ._-' else '?' for c in text)


def _licence(licence: Optional[str], claimed: bool) -> str:
    if claimed:
        return f'{licence}, stated by the person who converted the weights (`--license`), not verified'
    return f'{licence}, stated by the source' if licence else 'no licence stated'


def _figures(entry: Optional[Weights], source: Source) -> str:
    lines = []
    if entry and entry.published:
        figure = f'top-1 {entry.published} % on {entry.dataset} at the input size above'
        lines.append(f'- **published** with the weights of this name: {figure}')
        lines.append('- The accuracy of this file was not measured. It may differ from the published weights.')
    if source.measured:
        lines.append(f'- **measured** by train.py on its validation data: {source.measured}')
    return '\n'.join(lines) or 'Not measured.'
