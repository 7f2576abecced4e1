"""Records and plots the attention of the SK units of a model.

    with record(model) as units:
        for images in loader:
            model(images)
    units['SK_3_4'].mean  # (M, C), over all images

`scale_experiment` repeats the experiment of the paper (section 4.4): how attention changes as images are enlarged.
"""

from timm_sknet.attention.recording import Unit, find_units, record, typical_units
from timm_sknet.attention.scale import EnlargedImages, ScaleResult, scale_experiment, table, write_csv

__all__ = [
    'EnlargedImages',
    'ScaleResult',
    'Unit',
    'find_units',
    'record',
    'scale_experiment',
    'table',
    'typical_units',
    'write_csv',
]
