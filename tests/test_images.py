"""How image files are found, read and loaded in batches."""

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_data_config

from timm_sknet import images
from timm_sknet.images import ImageFiles, find_images, load_batches, pillow_for_photographs, read_image
from timm_sknet.predict import PHOTOS, classify, load_model


def found_in(folder):
    """Returns the names of the images in a folder, relative to it, and the errors."""
    errors = []
    files = find_images(folder, errors.append)
    return [str(file.relative_to(folder)) for file in files], [str(e) for e in errors]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# Finding


def test_all_formats_of_photographs_that_pillow_opens_are_found(tmp_path):
    photographs = '.jpg .JPEG .jfif .png .Gif .tif .TIFF .webp .avif .bmp .jp2 .tga .ppm .mpo'.split()
    others = '.h5 .hdf .bufr .grib .mpg .mpeg .eps .ps .wmf .emf .pdf .txt .csv .npy'.split()
    touch(tmp_path, *(f'image{ending}' for ending in photographs + others), 'jpg')
    names, errors = found_in(tmp_path)
    assert (names, errors) == (sorted(f'image{ending}' for ending in photographs), [])


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, 'data/cat/1.png', 'elsewhere/dog/2.png', 'file.png')
    for link, target in {
        'data/dog': '../elsewhere/dog',
        'data/hound': '../elsewhere/dog',  # a class folder that is linked twice counts twice
        'data/cat/0.png': '../../file.png',
        'data/cat/loop': '.',
        'data/cat/all': '..',
        'elsewhere/dog/cats': '../../data/cat',
    }.items():
        (tmp_path / link).symlink_to(target)
    cats = ['cat/0.png', 'cat/1.png']
    dogs = ['dog/2.png', *(f'dog/cats/{Path(name).name}' for name in cats)]
    expected = [*cats, *dogs, *(name.replace('dog', 'hound') for name in dogs)]
    names, errors = found_in(tmp_path / 'data')
    assert (names, errors) == (sorted(expected), [])


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, '.x/a.png', '.x/._a.png', '.x/.ipynb_checkpoints/a.png', '.x/sub/.hidden.jpg')
    (tmp_path / '.x' / '.link').symlink_to('nowhere')
    assert found_in(tmp_path / '.x') == (['a.png'], [])  # a hidden folder that the user names is searched


def test_broken_links_are_named(tmp_path):
    touch(tmp_path, 'a.png')
    for name, target in ('class', 'nowhere'), ('long.png', 'x' * 300), ('self', 'self'), ('file.png', 'a.png/b.png'):
        (tmp_path / name).symlink_to(target)
    names, errors = found_in(tmp_path)
    assert names == ['a.png']
    assert sorted(errors) == [
        f'{tmp_path}/class: broken link: No such file or directory',
        f'{tmp_path}/file.png: broken link: Not a directory',
        f'{tmp_path}/long.png: broken link: File name too long',
        f'{tmp_path}/self: broken link: Too many levels of symbolic links',
    ]


def test_devices_are_named(tmp_path):
    touch(tmp_path, 'a.png')
    os.mkfifo(tmp_path / 'pipe.png')
    os.mkfifo(tmp_path / 'pipe')
    assert found_in(tmp_path) == (['a.png'], [f'{tmp_path}/pipe.png: cannot be read: not a regular file'])


@pytest.mark.parametrize('call', ['scandir', 'stat'])
def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, call):
    touch(tmp_path, 'a/1.png', 'locked/2.png', 'z/3.png')
    original = getattr(os, call)

    def refuse(path, *args, **kwargs):  # tests may run as root, who may read every folder
        if str(path).endswith('locked'):
            raise PermissionError(13, 'Permission denied')
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    assert found_in(tmp_path) == (['a/1.png', 'z/3.png'], [f'{tmp_path}/locked: cannot be read: Permission denied'])


def test_a_folder_without_images_is_an_error(tmp_path):
    touch(tmp_path, 'notes.txt')
    with pytest.raises(ValueError, match='no image in this folder or its subfolders'):
        find_images(tmp_path)


# Reading


@pytest.mark.parametrize('ending', ['png', 'tiff', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_rotated_as_their_exif_orientation_says(tmp_path, orientation, ending):
    upright = Image.open(PHOTOS / 'horse.jpg').convert('RGB').resize((40, 30))
    T = Image.Transpose
    stored = [  # the transposition that the camera did, for each orientation
        None,
        T.FLIP_LEFT_RIGHT,
        T.ROTATE_180,
        T.FLIP_TOP_BOTTOM,
        T.TRANSPOSE,
        T.ROTATE_90,
        T.TRANSVERSE,
        T.ROTATE_270,
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = upright if stored is None else upright.transpose(stored)
    picture.save(tmp_path / f'x.{ending}', exif=exif, lossless=True)
    read = read_image(tmp_path / f'x.{ending}')
    assert read.size == upright.size and read.tobytes() == upright.tobytes()


def test_damaged_exif_data_does_not_matter(tmp_path):
    picture = Image.open(PHOTOS / 'horse.jpg')
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'description'
    for i in range(8, len(exif.tobytes())):
        data = bytearray(exif.tobytes())
        data[i] ^= 0xFF
        picture.save(tmp_path / 'x.jpg', exif=bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with pillow_for_photographs():
                assert sorted(read_image(tmp_path / 'x.jpg').size) == sorted(picture.size)


def palette(pixels):
    image = Image.new('P', (2, 1))
    image.putpalette([0, 0, 0, 200, 100, 0])
    image.putdata(pixels)
    return image


TRANSPARENT = {  # the first pixel is transparent and black, the second one is opaque
    'RGBA': (Image.new('RGBA', (1, 1), (200, 100, 0, 255)), {}, (200, 100, 0)),
    'LA': (Image.new('LA', (1, 1), (100, 255)), {}, (100, 100, 100)),
    'P': (palette([0, 1]), {'transparency': 0}, (200, 100, 0)),
    'P with alpha': (palette([0, 1]), {'transparency': b'\0\xff'}, (200, 100, 0)),
    'RGB': (Image.new('RGB', (1, 1), (200, 100, 0)), {'transparency': (0, 0, 0)}, (200, 100, 0)),
    'L': (Image.new('L', (1, 1), 100), {'transparency': 0}, (100, 100, 100)),
}


@pytest.mark.parametrize('name', TRANSPARENT)
def test_transparent_pixels_become_white(tmp_path, name):
    image, options, color = TRANSPARENT[name]
    if image.width == 1:
        opaque, image = image, Image.new(image.mode, (2, 1))
        image.paste(opaque, (1, 0))
    image.save(tmp_path / 'x.png', **options)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read = read_image(tmp_path / 'x.png')
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), color]
    assert read_image(tmp_path / 'x.png', 'L').getpixel((0, 0)) == 255


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new('RGBA', (1, 1), (0, 100, 255, 51)).save(tmp_path / 'x.png')
    assert read_image(tmp_path / 'x.png').getpixel((0, 0)) == (204, 224, 255)


@pytest.mark.parametrize('in_chans', [3, 1])
def test_other_images_are_preprocessed_as_by_timms_scripts(tmp_path, in_chans):
    torch.manual_seed(0)
    for i, mode in enumerate(['RGB', 'L', 'P', '1', 'CMYK', 'RGBA', 'LA']):
        noise = torch.randint(256, (50 + i, 60, 3), dtype=torch.uint8).numpy()
        image = Image.fromarray(noise).convert(mode)
        image.save(tmp_path / f'{i}.{"jpg" if mode == "CMYK" else "png"}')  # alpha channels are opaque
    model = timm.create_model('sknet12', in_chans=in_chans, device='meta')
    model.pretrained_cfg |= dict(input_size=(in_chans, 32, 32), mean=(0.4,) * in_chans, std=(0.2,) * in_chans)
    config = resolve_data_config({}, model=model)
    theirs = ImageDataset(
        str(tmp_path), transform=create_transform(**config), input_img_mode='RGB' if in_chans == 3 else 'L'
    )
    ours = ImageFiles(model, find_images(tmp_path))
    assert len(ours) == len(theirs) == 7
    for a, (b, _) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_large_photographs_are_read_without_a_warning_and_larger_ones_named(tmp_path, monkeypatch):
    assert images.MOST_PIXELS > 16384 * 12288  # a phone with 200 megapixels
    monkeypatch.setattr(images, 'MOST_PIXELS', 1000)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)  # Pillow warns above this number
    for name, size in ('large.png', 30), ('huge.png', 40):
        Image.new('RGB', (size, size)).save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pillow_for_photographs():
            assert read_image(tmp_path / 'large.png').size == (30, 30)
            with pytest.raises(ValueError, match=r'huge\.png: .*1600 pixels.* Reduce the size of the image'):
                read_image(tmp_path / 'huge.png')
    assert Image.MAX_IMAGE_PIXELS == 400


# Loading in batches


@pytest.fixture(scope='module')
def model():
    return load_model('sknet12.cifar10', 'cpu')


@pytest.fixture
def files(tmp_path):
    """Six files, the first and the last of which are not images."""
    photos = find_images(PHOTOS)
    touch(tmp_path, 'a.png', 'b.png')
    return [tmp_path / 'a.png', *photos, tmp_path / 'b.png']


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_keep_the_order_of_the_files(model, files, workers):
    batches = list(load_batches(ImageFiles(model, files), 2, workers))
    assert [len(errors) for errors, _ in batches] == [2, 2, 2]
    assert [[bool(e) for e in errors] for errors, _ in batches] == [[True, False], [False, False], [False, True]]
    assert [len(found) for _, found in batches] == [1, 2, 1]


def test_a_batch_without_a_readable_image_is_empty(model, files):
    ((errors, found),) = load_batches(ImageFiles(model, files[:1]), 2)
    assert 'not an image' in str(errors[0]) and found is None


@pytest.mark.parametrize(
    'number, batch_size, cores, workers, size',
    [
        (32, 32, 4, 0, 32),  # one batch
        (33, 32, 4, 4, 9),
        (33, 32, 64, 4, 9),
        (2000, 32, 2, 2, 32),
        (4, 1, 8, 0, 1),
        (0, 32, 2, 0, 32),
    ],
)
@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # more workers than this machine has cores
def test_every_cpu_core_gets_a_batch_by_default(monkeypatch, number, batch_size, cores, workers, size):
    monkeypatch.setattr(images, '_cpu_cores', lambda: cores)
    loader = load_batches(range(number), batch_size, None)
    assert (loader.num_workers, loader.batch_size) == (workers, size)


def test_no_worker_starts_without_a_batch():
    assert load_batches(range(5), 2, 1_000_000).num_workers == 3


def test_workers_predict_the_same(model, files):
    alone, together = (dict(classify(model, files, 3, 2, workers)) for workers in (0, 2))
    assert list(alone) == list(together) == files
    for a, b in zip(alone.values(), together.values()):
        if isinstance(a, ValueError):
            assert str(a) == str(b) and 'not an image' in str(a)
        else:
            assert [p.index for p in a] == [p.index for p in b]
            assert [p.probability for p in a] == pytest.approx([p.probability for p in b], abs=1e-5)


@pytest.mark.slow
def test_workers_can_be_started_as_on_macos_and_windows(model, files, monkeypatch):
    Image.new('1', (13500, 13500)).save(files[0])  # Pillow raises an error above 179 million pixels
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method('spawn', force=True)
    try:
        results = list(classify(model, files[:2], 1, 2, 1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert [len(predictions) for _, predictions in results] == [1, 1]


def test_an_image_that_cannot_be_preprocessed_does_not_stop_the_others(model, files, monkeypatch):
    def fail(self, image):
        if image.size[0] == 32:
            raise MemoryError
        return original(self, image)

    original = ImageFiles.preprocess
    monkeypatch.setattr(ImageFiles, 'preprocess', fail)
    Image.new('RGB', (32, 32)).save(files[0])
    error, *others = (result for _, result in classify(model, files[:5]))
    assert str(error) == f'{files[0]}: cannot be preprocessed: MemoryError()'
    assert all(len(predictions) == 5 for predictions in others)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason='There is no accelerator.')
@pytest.mark.parametrize('workers', [0, 2])
def test_the_accelerator_predicts_the_same(model, files, workers):
    fast = load_model('sknet12.cifar10')
    assert next(fast.parameters()).device.type == torch.accelerator.current_accelerator().type
    for (_, a), (_, b) in zip(classify(model, files[1:5]), classify(fast, files[1:5], 5, 2, workers)):
        assert [p.index for p in a][:2] == [p.index for p in b][:2]


def test_models_are_loaded_to_the_accelerator_that_torch_detects(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    assert next(load_model('sknet12.cifar10').parameters()).device.type == 'meta'
    assert next(load_model('sknet12.cifar10', 'cpu').parameters()).device.type == 'cpu'
