"""The command `timm-sknet`. Each subcommand has a parser in `_parser` and a function `_name(args) -> exit code`."""

import argparse
import io
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, TextIO

from huggingface_hub.utils import tqdm
from safetensors import SafetensorError

from timm_sknet import __version__
from timm_sknet.attention.draw import draw
from timm_sknet.checkpoints.convert import convert
from timm_sknet.checkpoints.push import push
from timm_sknet.images import BATCH_SIZE, find_images, pillow_for_photographs
from timm_sknet.info import info
from timm_sknet.predict import PHOTOS, classify, load_model
from timm_sknet.table import format_table, model_table

DEFAULT_MODEL = 'sknet12.cifar10'
EXIT_CODES = (
    'Exit code: 0 if all images were processed, 1 if some images, folders or links could not be read (they are named '
    'on stderr), 2 if the command stopped with an error or processed no image.'
)
PREPROCESSING = (
    'Folders are searched for all formats of photographs that Pillow opens. Links are followed. Hidden files and '
    'folders are left out. Images are rotated as their EXIF orientation says, and transparent pixels become white. For '
    "images without EXIF orientation and transparency, the preprocessing is that of timm's validate.py."
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Command-line arguments; None for those of the process.

    Returns:
        The exit code, see `EXIT_CODES`; 130 after Ctrl-C and 141 if stdout was closed, as in shells.
    """
    with _terminated_by_exception(), _streams_for_any_text():
        try:
            try:
                args = _parser().parse_args(argv)
                return args.run(args)
            finally:
                sys.stdout.flush()  # detects a closed pipe here, not at exit, where Python prints an error
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            _discard(sys.stdout)
            return 141
        except OSError as e:  # of stdout: the commands report all others
            _discard(sys.stdout)
            return _fail(OSError(f'Cannot write to standard output: {e.strerror or "it is closed"}.'))


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Context manager in which SIGTERM raises SystemExit, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _streams_for_any_text() -> Iterator[None]:
    """Context manager in which stdout escapes the characters that its encoding lacks, and closed streams are files."""
    stdout, stderr = sys.stdout, sys.stderr
    errors = stdout.errors if isinstance(stdout, io.TextIOWrapper) else None
    # Python has None for a closed stream
    sys.stdout = stdout or open(os.devnull, encoding='utf-8')  # opened for reading: writing raises an OSError
    sys.stderr = stderr or open(os.devnull, 'w', encoding='utf-8', errors='backslashreplace')
    try:
        if isinstance(stdout, io.TextIOWrapper):
            stdout.reconfigure(errors='backslashreplace')
        yield
    finally:
        if isinstance(stdout, io.TextIOWrapper):
            stdout.reconfigure(errors=errors)
        sys.stdout, sys.stderr = stdout, stderr


def _discard(stream: TextIO) -> None:
    """Discards what is in the buffer of a stream that cannot be written. Python would write it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-sknet', description='Selective Kernel Networks for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    predict = commands.add_parser(
        'predict', help='classify images', description=f'Classify images. {PREPROCESSING}', epilog=EXIT_CODES
    )
    predict.set_defaults(run=_predict)
    predict.add_argument(
        'paths',
        nargs='*',
        metavar='IMAGE|FOLDER',
        help='image files, or folders to search recursively (default: the photographs in the package)',
    )
    predict.add_argument(
        '--model',
        default=DEFAULT_MODEL,
        metavar='NAME',
        help='a timm model with pretrained weights, hf-hub:ORG/REPO or local-dir:FOLDER (default: %(default)s, whose '
        'weights are in the package)',
    )
    predict.add_argument(
        '--topk',
        type=partial(_integer, minimum=1),
        default=5,
        metavar='K',
        help='number of classes to show for each image (default: %(default)s)',
    )
    predict.add_argument('--json', action='store_true', help='print a JSON list of {file, predictions}')
    _add_speed_options(
        predict,
        workers='number of processes that read images, and run the model if it is on a CPU (default: one for each CPU '
        'core, or 0 if there is only one batch)',
    )

    attention = commands.add_parser(
        'attention',
        help='draw how the attention of SK units changes while images are enlarged',
        description='Draw the attention of the wide branch minus the attention of the narrow branch for images that '
        'are enlarged around their centre, as in the paper. For image files, draw each image: all units, '
        'and the channels of one unit. For a folder, draw means over the images: all units, and each class in some '
        'units. The class of an image is the name of its folder. To continue an interrupted run over a folder, repeat '
        f'the command. {PREPROCESSING}',
        epilog=EXIT_CODES,
    )
    attention.set_defaults(run=_attention)
    attention.add_argument(
        'paths', nargs='+', metavar='IMAGE|FOLDER', help='image files, or folders to search recursively'
    )
    attention.add_argument(
        '--model',
        default=DEFAULT_MODEL,
        metavar='NAME',
        help='a timm model with SK units and pretrained weights, hf-hub:ORG/REPO or local-dir:FOLDER '
        '(default: %(default)s, whose weights are in the package)',
    )
    attention.add_argument(
        '--out', required=True, type=Path, metavar='FIGURE', help='the figure to write, .png or .svg'
    )
    attention.add_argument('--csv', type=Path, metavar='FILE', help='also write the plotted values to this .csv file')
    attention.add_argument(
        '--scales',
        nargs='+',
        type=float,
        default=[1.0, 1.5, 2.0],
        metavar='S',
        help='factors by which the images are enlarged (default: 1 1.5 2)',
    )
    attention.add_argument(
        '--units',
        nargs='+',
        default=[],
        metavar='NAME',
        help='SK units to draw in detail, such as SK_3_2: per class for a folder, per channel for images (default: '
        'units shown in the paper)',
    )
    _add_speed_options(
        attention,
        workers='number of processes that read images (default: one for each CPU core, or 0 if the model is on a CPU)',
    )

    models = commands.add_parser(
        'models', help='list the models', description='List the models with their weights and accuracies.'
    )
    models.set_defaults(run=_models)
    models.add_argument('--markdown', action='store_true', help='print a Markdown table')

    recipe = commands.add_parser(
        'recipe',
        help="find a recipe for timm's train.py",
        description="Print the path of a recipe for timm's train.py -c. Without NAME, list the recipes.",
    )
    recipe.set_defaults(run=_recipe)
    recipe.add_argument('name', nargs='?', metavar='NAME', help='name of the recipe')

    convert = commands.add_parser(
        'convert',
        help='convert weights to a folder for timm and transformers',
        description='Convert weights to a folder that timm, its scripts and transformers load.',
        epilog='Exit code: 0 if the folder was written, 2 if not. Errors are reported in one line on stderr.',
    )
    convert.set_defaults(run=_convert)
    convert.add_argument(
        'source',
        metavar='SOURCE',
        help="a .caffemodel or .pth.tar file of the paper's authors, a TensorFlow checkpoint of SimCLRv2 (index, "
        "prefix or folder), weights of timm's SK networks, a checkpoint of timm's train.py or of another program, or "
        'ORG/NAME on the Hub; the type is detected from the content',
    )
    convert.add_argument('out', metavar='OUT', type=Path, help='the folder to write')
    convert.add_argument(
        '--arch',
        required=True,
        metavar='NAME',
        help='the model, such as sknet50; sknet50_caffe or sknet101_caffe for Caffe files; sk_resnet50x1_simclr and '
        'others for SimCLRv2',
    )
    convert.add_argument('--no-ema', action='store_true', help='do not use the averaged (EMA) weights of a checkpoint')
    convert.add_argument(
        '--dtype',
        choices=('float32', 'float16'),
        default='float32',
        help='data type of the weights; batch norm statistics are always float32 (default: %(default)s)',
    )
    convert.add_argument(
        '--num-classes',
        type=_integer,
        metavar='N',
        help='number of classes that SOURCE must have, or 0 to leave out its classifier (default: as in SOURCE)',
    )
    convert.add_argument('--tag', default='', help='tag of the weights, as in MODEL.TAG')
    convert.add_argument('--license', default='', help='licence of the weights; the model card says that you stated it')
    convert.add_argument(
        '--label-names',
        type=Path,
        metavar='FILE|FOLDER',
        help='text file with one class name per line, in the order of the class indices, or the folder with the class '
        "folders of the data. timm's train.py sorts class folders by name: numbers as numbers, ignoring case",
    )
    convert.add_argument('--force', action='store_true', help='replace a folder that an earlier conversion wrote')

    push = commands.add_parser(
        'push',
        help='upload a converted folder to the Hub',
        description='Upload a folder that `timm-sknet convert` wrote to the Hugging Face Hub.',
        epilog='Exit code: 0 if the folder was uploaded, 2 if not. Errors are reported in one line on stderr.',
    )
    push.set_defaults(run=_push)
    push.add_argument('folder', metavar='FOLDER', type=Path, help='the folder to upload')
    push.add_argument('repo', metavar='ORG/NAME', help='the repository; created if it does not exist')
    push.add_argument('--private', action='store_true', help='create a private repository')
    push.add_argument(
        '--revision', metavar='BRANCH', help='branch to push to; created if it does not exist (default: main)'
    )

    info = commands.add_parser(
        'info',
        help='describe the installation, for bug reports',
        description='Print versions, whether the models are registered without an import, and the settings of the Hub.',
    )
    info.set_defaults(run=_info)
    return parser


def _add_speed_options(parser: argparse.ArgumentParser, workers: str) -> None:
    parser.add_argument(
        '--device',
        metavar='NAME',
        help='such as cpu or cuda:1 (default: the accelerator that torch detects, or the CPU)',
    )
    parser.add_argument(
        '--batch-size',
        type=partial(_integer, minimum=1),
        default=BATCH_SIZE,
        metavar='B',
        help='largest number of images in a forward pass (default: %(default)s)',
    )
    parser.add_argument('--workers', type=_integer, metavar='N', help=workers)


def _integer(text: str, minimum: int = 0) -> int:
    if not (text.isdecimal() and int(text) >= minimum):
        raise argparse.ArgumentTypeError(f'must be an integer of at least {minimum}, got {text!r}')
    return int(text)


def _print_error(message: str) -> None:
    try:
        tqdm.write(f'timm-sknet: {message}', file=sys.stderr)  # does not break a progress bar
    except OSError:
        _discard(sys.stderr)


def _print_done(message: str) -> None:
    """Prints what the command has done. An error of stdout is not an error of the command."""
    try:
        print(message, flush=True)
    except OSError:
        _discard(sys.stdout)


def _fail(error: BaseException) -> int:
    """Prints the error in one line on stderr; returns exit code 2."""
    _print_error(' '.join(str(error).split()))
    return 2


def _predict(args: argparse.Namespace) -> int:
    with pillow_for_photographs():
        return _print_predictions(args)


def _print_predictions(args: argparse.Namespace) -> int:
    failed: List[ValueError] = []

    def on_error(error: ValueError) -> None:
        failed.append(error)
        _print_error(str(error))

    files = [file for path in args.paths or [PHOTOS] for file in find_images(path, on_error)]
    if not files:
        return 2
    try:
        model = load_model(args.model, args.device)
    except (RuntimeError, ValueError) as e:
        return _fail(e)

    found, done = [], 0
    # disable=None shows the bar only on a terminal
    bar = tqdm(total=len(files), unit='image', leave=False, disable=None if len(files) > args.batch_size else True)
    results = classify(model, files, args.topk, args.batch_size, args.workers)
    while True:
        try:
            file, predictions = next(results)
        except StopIteration:
            break
        except Exception as e:  # a third-party model may fail on the input of its own cfg
            # an error in a worker comes with its traceback
            reason = str(e).strip().splitlines()[-1] if 'Original Traceback' in str(e) else repr(e)
            return _fail(RuntimeError(f'Model {args.model!r} failed on the images: {reason}'))
        bar.update()
        if isinstance(predictions, ValueError):
            on_error(predictions)
            continue
        done += 1
        if args.json:
            found.append({'file': str(file), 'predictions': [asdict(p) for p in predictions]})
        else:
            name = str(file).encode(errors='backslashreplace').decode()  # a name may contain bytes that are not text
            lines = [f'{p.probability:8.1%}  {p.label}' for p in predictions]
            tqdm.write('\n'.join([name, *lines]))
    bar.close()
    if args.json:
        print(json.dumps(found, indent=2))
    return (1 if done else 2) if failed else 0


def _attention(args: argparse.Namespace) -> int:
    failed: List[ValueError] = []

    def on_error(error: ValueError) -> None:
        failed.append(error)
        _print_error(str(error))

    try:
        with pillow_for_photographs():
            drawn = draw(
                args.paths,
                args.model,
                args.out,
                args.csv,
                args.scales,
                args.units,
                args.workers,
                on_error=on_error,
                device=args.device,
                batch_size=args.batch_size,
            )
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        return _fail(e)
    if not drawn:
        return 2
    _print_done(f'Wrote {args.out}.')
    return 1 if failed else 0


def _models(args: argparse.Namespace) -> int:
    print(format_table(model_table(), markdown=args.markdown))
    return 0


def _recipe(args: argparse.Namespace) -> int:
    recipes = {file.stem: file for file in sorted((Path(__file__).parent / 'recipes').glob('*.yaml'))}
    if not args.name:
        for name, file in recipes.items():
            description, *_ = file.read_text(encoding='utf-8').splitlines()
            print(f'{name:24}{description.removeprefix("# ")}')
        return 0
    name = args.name.removesuffix('.yaml')
    if name not in recipes:
        return _fail(ValueError(f'There is no recipe {args.name!r}. Choose one of {", ".join(recipes)}.'))
    print(recipes[name])
    return 0


def _convert(args: argparse.Namespace) -> int:
    try:
        convert(
            args.source,
            args.out,
            args.arch,
            ema=not args.no_ema,
            dtype=args.dtype,
            num_classes=args.num_classes,
            tag=args.tag,
            license=args.license,
            label_names=args.label_names,
            force=args.force,
        )
    except (ValueError, OSError, SafetensorError, ImportError, MemoryError) as e:
        return _fail(e)
    _print_done(f'Wrote {args.out}. Load it with timm.create_model({f"local-dir:{args.out}"!r}, pretrained=True).')
    return 0


def _push(args: argparse.Namespace) -> int:
    try:
        name = push(args.folder, args.repo, private=args.private, revision=args.revision)
    except (ValueError, OSError) as e:
        return _fail(e)
    _print_done(f'Pushed. Load it with timm.create_model({name!r}, pretrained=True).')
    return 0


def _info(args: argparse.Namespace) -> int:
    for name, value in info().items():
        print(f'{name:17}{value}')
    return 0
