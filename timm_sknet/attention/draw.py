"""Draws the attention of a model on image files: the work behind `timm-sknet attention`."""

import os
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence

from timm_sknet import predict
from timm_sknet.attention.recording import find_units, typical_units
from timm_sknet.attention.scale import SCALES, scale_experiment, table, write_csv
from timm_sknet.images import BATCH_SIZE, find_images, read_image


def draw(
    paths: Sequence[str],
    model_name: str,
    out: Path,
    csv: Optional[Path] = None,
    scales: Sequence[float] = SCALES,
    units: Sequence[str] = (),
    workers: Optional[int] = 0,
    on_error: Callable[[ValueError], Any] = lambda e: None,
    device: Optional[str] = None,
    batch_size: int = BATCH_SIZE,
) -> bool:
    """Runs the paper's scale experiment on images, and writes the figure and, if requested, the numbers.

    Args:
        paths: Images, or folders of images. If there is a folder, the figure is by class, else by image.
        model_name: As for `timm_sknet.predict.load_model`.
        out: The figure, a .png or .svg file.
        csv: A .csv file for the numbers.
        scales: Factors by which the images are enlarged.
        units: Names of the SK units to draw in detail: per channel for images, per class for a folder. If empty, the
            units shown in the paper.
        workers: As for `scale_experiment`.
        on_error: Called with the reason for each image or folder that cannot be read.
        device: As for `timm_sknet.predict.load_model`.
        batch_size: As for `scale_experiment`.

    Returns:
        False if no image could be read, so that there is no figure.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If a file cannot be written.
        RuntimeError: If the model cannot be loaded, or the device is not available.
        ValueError: If an argument is invalid.
    """
    try:
        from timm_sknet.attention.figures import FORMATS, MOST_IMAGES, draw_classes, draw_images
    except ImportError as e:
        raise ImportError('Figures need matplotlib. Install it with: pip install matplotlib') from e

    for option, path, endings in ('--out', out, FORMATS), ('--csv', csv, ('.csv',)):
        if path and path.suffix.lower() not in endings:
            raise ValueError(f'{option} must end in {" or ".join(endings)}, got {str(path)!r}.')
        if path and not path.parent.is_dir():
            raise ValueError(f'There is no folder {str(path.parent)!r} for {option} {path.name}. Create it first.')
        if path and path.is_dir():
            raise ValueError(f'{option} must be a file, got the folder {str(path)!r}.')
    if any(_same_file(out, Path(path)) for path in paths):
        raise ValueError(f'--out would replace the image {str(out)!r}. Choose another name.')
    by_class = any(os.path.isdir(path) for path in paths)
    found = (file for path in paths for file in find_images(path, on_error))
    files = [file for file in found if not _same_file(file, out)]  # skips an earlier figure
    if not files:
        return False
    if not by_class and len(files) > MOST_IMAGES:
        raise ValueError(
            f'{len(files)} images do not fit into one figure. Give at most {MOST_IMAGES} images, or a folder.'
        )
    model = predict.load_model(model_name, device)
    known = list(find_units(model))
    units = list(dict.fromkeys(units)) or typical_units(known)[slice(None) if by_class else slice(1, 2)]
    unknown = [name for name in units if name not in known]
    if unknown:
        raise ValueError(f'{model_name} has no unit {", ".join(unknown)}. It has {", ".join(known)}.')

    if by_class:
        state = out.with_name(f'{out.name}.state')
        results = [scale_experiment(model, files, scales, workers, state, on_error, batch_size)]
        draw_classes(results[0], units, out)
    else:
        readable = _readable(files, on_error)
        if not readable:
            return False
        results = [scale_experiment(model, [file], scales, batch_size=batch_size) for file in readable]
        draw_images(model, results, units, out)
    if csv:
        groups = [result.classes if by_class else [str(file) for file in result.files] for result in results]
        write_csv([row for result, names in zip(results, groups) for row in table(result, names)], csv)
    return True


def _same_file(a: Path, b: Path) -> bool:
    """Returns whether two paths name the same existing file, also where names ignore case."""
    return os.path.exists(a) and os.path.exists(b) and a.samefile(b)  # Path.exists raises errors of the file system


def _readable(files: Sequence[Path], on_error: Callable[[ValueError], Any]) -> List[Path]:
    readable = []
    for file in files:
        try:
            read_image(file)
            readable.append(file)
        except ValueError as e:
            on_error(e)
    return readable
