"""The command `timm-sknet`. A subcommand is a function `_name(args) -> exit code` and its few lines in `_parser`."""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Optional, Sequence

from timm_sknet import __version__

DEFAULT_MODEL = 'sknet12.cifar10'
EXIT_CODES = 'Exit code: 0 all done, 1 some images could not be read (each is named on stderr), 2 nothing was done.'


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        The exit code, see `EXIT_CODES`; 130 after Ctrl-C and 141 when stdout was closed, as shells have it.
    """
    args = _parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing unfinished is left behind
    try:
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe is noticed here and not at exit, where Python would complain
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer at exit
        return 141
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-sknet', description='Selective Kernel Networks for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    predict = commands.add_parser('predict', help='classify images', description='Classify images.', epilog=EXIT_CODES)
    predict.set_defaults(run=_predict)
    predict.add_argument(
        'paths',
        nargs='*',
        metavar='IMAGE|FOLDER',
        help='files, and folders to search with all that is below them (default: the photographs in the package)',
    )
    predict.add_argument(
        '--model',
        default=DEFAULT_MODEL,
        metavar='NAME',
        help='any model of timm with weights, hf-hub:ORG/REPO or local-dir:FOLDER (default: %(default)s, built in)',
    )
    predict.add_argument(
        '--topk',
        type=partial(_whole, least=1),
        default=5,
        metavar='K',
        help='likeliest classes to show (default: %(default)s)',
    )
    predict.add_argument('--json', action='store_true', help='print one JSON list of {file, predictions}')

    attention = commands.add_parser(
        'attention',
        help='draw what the SK units select as objects grow',
        description='Draw the attention of SK units to the wide branch, less that to the narrow one, as images are '
        "enlarged about their centre: the paper's figures. Of image files, each with every unit and the channels of "
        'one; of a folder, the mean over its images in every unit and over each class in some. The folder that an '
        'image lies in is its class. A run over a folder that was interrupted goes on from there when it is repeated.',
        epilog=EXIT_CODES,
    )
    attention.set_defaults(run=_attention)
    attention.add_argument('paths', nargs='+', metavar='IMAGE|FOLDER', help='files, or folders with all below them')
    attention.add_argument(
        '--model',
        default=DEFAULT_MODEL,
        metavar='NAME',
        help='any model of timm with SK units and weights, hf-hub:ORG/REPO or local-dir:FOLDER '
        '(default: %(default)s, built in)',
    )
    attention.add_argument('--out', required=True, type=Path, metavar='FIGURE', help='the figure, .png or .svg')
    attention.add_argument('--csv', type=Path, metavar='FILE', help='write the figures behind the figure, too')
    attention.add_argument(
        '--scales', nargs='+', type=float, default=[1.0, 1.5, 2.0], metavar='S', help='(default: 1 1.5 2)'
    )
    attention.add_argument(
        '--units',
        nargs='+',
        default=[],
        metavar='NAME',
        help="units whose classes or channels are shown, such as SK_3_2 (default: the paper's choice)",
    )
    attention.add_argument(
        '--workers', type=_whole, default=0, metavar='N', help='processes that read images (default: %(default)s)'
    )

    models = commands.add_parser('models', help='list the models', description='List the models and their figures.')
    models.set_defaults(run=_models)
    models.add_argument('--markdown', action='store_true', help="print the README's table")

    recipe = commands.add_parser(
        'recipe',
        help="find a recipe for timm's train.py",
        description="Print the path of a recipe, for timm's train.py -c; without a name, list the recipes.",
    )
    recipe.set_defaults(run=_recipe)
    recipe.add_argument('name', nargs='?', metavar='NAME')

    convert = commands.add_parser(
        'convert',
        help="convert the authors' files and other weights",
        description='Convert weights to a folder that timm, its scripts and transformers load.',
        epilog='Exit code: 0 the folder is written, 2 it is not (one line on stderr says why).',
    )
    convert.set_defaults(run=_convert)
    convert.add_argument(
        'source',
        metavar='SOURCE',
        help="a .caffemodel or .pth.tar of the paper's authors, weights of timm's skresnext50_32x4d, a checkpoint of "
        "timm's train.py, or ORG/NAME on the Hub; the kind is detected from the content",
    )
    convert.add_argument('out', metavar='OUT', type=Path, help='the folder to write')
    convert.add_argument(
        '--arch',
        required=True,
        metavar='NAME',
        help='the model, such as sknet50; sknet50_caffe and sknet101_caffe for Caffe files',
    )
    convert.add_argument('--no-ema', action='store_true', help='do not take the averaged weights of a checkpoint')
    convert.add_argument(
        '--dtype',
        choices=('float32', 'float16'),
        default='float32',
        help='of the file; batch norm statistics are float32 in any case (default: %(default)s)',
    )
    convert.add_argument(
        '--num-classes',
        type=_whole,
        metavar='N',
        help='classes that SOURCE must have, or 0 to leave its classifier out (default: as many as it has)',
    )
    convert.add_argument('--tag', default='', help='name of the weights behind that of the model')
    convert.add_argument('--license', default='', help='licence of the weights; the model card says that you claim it')
    convert.add_argument('--label-names', type=Path, metavar='FILE', help='text file, the name of a class on each line')
    convert.add_argument('--force', action='store_true', help='replace a folder that an earlier conversion has written')

    push = commands.add_parser(
        'push',
        help='upload a converted folder to the Hub',
        description='Upload a folder that `timm-sknet convert` has written to the Hugging Face Hub.',
        epilog='Exit code: 0 the Hub has it, 2 it has not (one line on stderr says why).',
    )
    push.set_defaults(run=_push)
    push.add_argument('folder', metavar='FOLDER', type=Path)
    push.add_argument('repo', metavar='ORG/NAME', help='the repository, made if there is none')
    push.add_argument('--private', action='store_true', help='make a private repository')
    push.add_argument('--revision', metavar='BRANCH', help='push to this branch, made if there is none (default: main)')
    return parser


def _whole(text: str, least: int = 0) -> int:
    if not (text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f'must be a whole number from {least}, got {text!r}')
    return int(text)


def _complain(message: str) -> None:
    from huggingface_hub.utils import tqdm

    tqdm.write(f'timm-sknet: {message}', file=sys.stderr)  # beside a progress bar, not into it


def _refuse(error: BaseException) -> int:
    """Says in one line why nothing was done; returns the exit code for that."""
    _complain(' '.join(str(error).split()))
    return 2


def _predict(args: argparse.Namespace) -> int:
    from huggingface_hub.utils import tqdm

    from timm_sknet.images import find_images
    from timm_sknet.predict import BATCH_SIZE, PHOTOS, classify, load_model

    files, done, failed = [], 0, 0
    for path in args.paths or [PHOTOS]:
        try:
            files += find_images(path)
        except ValueError as e:
            failed += 1
            _complain(str(e))
    if not files:
        return 2
    try:
        model = load_model(args.model)
    except (RuntimeError, ValueError) as e:
        _complain(str(e))
        return 2

    found = []
    # None: only on a terminal
    bar = tqdm(total=len(files), unit='image', leave=False, disable=None if len(files) > BATCH_SIZE else True)
    results = classify(model, files, args.topk)
    while True:
        try:
            file, predictions = next(results)
        except StopIteration:
            break
        except Exception as e:  # a model of others may refuse what its own cfg asks for
            _complain(f'Model {args.model!r} failed on the images: {e!r}')
            return 2
        bar.update()
        name = str(file).encode(errors='backslashreplace').decode()  # names can hold bytes that are no text
        if isinstance(predictions, ValueError):
            failed += 1
            _complain(str(predictions))
            continue
        done += 1
        if args.json:
            found.append({'file': name, 'predictions': [asdict(p) for p in predictions]})
        else:
            lines = [f'{p.probability:8.1%}  {p.label}' for p in predictions]
            tqdm.write('\n'.join([name, *lines]))
    bar.close()
    if args.json:
        print(json.dumps(found, indent=2))
    return (1 if done else 2) if failed else 0


def _attention(args: argparse.Namespace) -> int:
    try:
        from timm_sknet.attention.figures import FORMATS, MOST_IMAGES, draw_classes, draw_images
    except ImportError:
        return _refuse(ImportError("Figures need matplotlib: pip install 'timm-sknet[plot]'."))
    from timm_sknet.attention import find_units, scale_experiment, table, typical_units, write_csv
    from timm_sknet.images import find_images, read_image
    from timm_sknet.predict import load_model

    failed = []

    def fail(error: ValueError) -> None:
        failed.append(error)
        _complain(str(error))

    by_class = any(os.path.isdir(path) for path in args.paths)
    try:
        for option, file, endings in ('--out', args.out, FORMATS), ('--csv', args.csv, ('.csv',)):
            if file and file.suffix.lower() not in endings:
                raise ValueError(f'{option} must end in {" or ".join(endings)}, got {str(file)!r}.')
            if file and not file.parent.is_dir():
                raise ValueError(f'There is no folder {str(file.parent)!r} to write {option} {file.name} to: make it.')
            if file and file.is_dir():
                raise ValueError(f'{option} must be a file, got the folder {str(file)!r}.')
        if any(args.out.absolute() == Path(path).absolute() for path in args.paths):
            raise ValueError(f'--out would replace the image {str(args.out)!r}: give it another name.')
        found = (file for path in args.paths for file in find_images(path))
        files = [file for file in found if file.absolute() != args.out.absolute()]  # that of an earlier run
        if not by_class and len(files) > MOST_IMAGES:
            raise ValueError(
                f'{len(files)} images do not fit into one figure: give {MOST_IMAGES} at most, or a folder of them.'
            )
        model = load_model(args.model)
        known = list(find_units(model))
        units = list(dict.fromkeys(args.units)) or typical_units(known)[slice(None) if by_class else slice(1, 2)]
        unknown = [name for name in units if name not in known]
        if unknown:
            raise ValueError(f'{args.model} has no unit {", ".join(unknown)}. It has {", ".join(known)}.')

        if by_class:
            state = args.out.with_name(f'{args.out.name}.state')
            results = [scale_experiment(model, files, args.scales, args.workers, state, fail)]
            draw_classes(results[0], units, args.out)
        else:
            readable = []
            for file in files:
                try:
                    read_image(file)
                    readable.append(file)
                except ValueError as e:
                    fail(e)
            if not readable:
                return 2
            results = [scale_experiment(model, [file], args.scales) for file in readable]
            draw_images(model, results, units, args.out)
        if args.csv:
            groups = [result.classes if by_class else [str(file) for file in result.files] for result in results]
            write_csv([row for result, names in zip(results, groups) for row in table(result, names)], args.csv)
    except (OSError, RuntimeError, ValueError) as e:
        return _refuse(e)
    print(f'{args.out} is drawn.')
    return 1 if failed else 0


def _models(args: argparse.Namespace) -> int:
    from timm_sknet.table import format_table, model_table

    print(format_table(model_table(), markdown=args.markdown))
    return 0


def _recipe(args: argparse.Namespace) -> int:
    recipes = {file.stem: file for file in sorted((Path(__file__).parent / 'recipes').glob('*.yaml'))}
    if not args.name:
        for name, file in recipes.items():
            what, *_ = file.read_text().splitlines()
            print(f'{name:24}{what.removeprefix("# ")}')
        return 0
    name = args.name.removesuffix('.yaml')
    if name not in recipes:
        return _refuse(ValueError(f'There is no recipe {args.name!r}. There are {", ".join(recipes)}.'))
    print(recipes[name])
    return 0


def _convert(args: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    from timm_sknet.checkpoints.convert import convert

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
        return _refuse(e)
    print(f'{args.out} is written. Load it with timm.create_model({f"local-dir:{args.out}"!r}, pretrained=True).')
    return 0


def _push(args: argparse.Namespace) -> int:
    from timm_sknet.checkpoints.push import push

    try:
        name = push(args.folder, args.repo, private=args.private, revision=args.revision)
    except (ValueError, OSError) as e:
        return _refuse(e)
    print(f'The Hub has it. Load it with timm.create_model({name!r}, pretrained=True).')
    return 0
