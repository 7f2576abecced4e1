"""Downloads from the Hub under faults, with the unmodified huggingface_hub, each in a separate process.

"right": the model has the right weights. "error": a RuntimeError names repository, cause and remedy. After every error
the same cache gives the right weights as soon as the fault is gone. `sknet50` and `hf-hub:` names behave alike.

| case                                                | outcome                                                      |
| ---                                                 | ---                                                          |
| 404 of the file or the repository, 401, 403 (gated) | error: check the name, log in                                |
| 500 or 503 of the file itself                       | error: try again later                                       |
| 500 of its metadata, always                         | error after 23 s of huggingface_hub's retries                |
| 503 of its metadata, once                           | right: huggingface_hub retries                               |
| connection ends in the middle, once                 | right: huggingface_hub continues by Range, in 10 MB steps    |
| connection ends in the middle, always               | error after 5 retries, 5 s                                   |
| connection reset in the middle                      | error: huggingface_hub does not retry                        |
| shorter than announced                              | error: huggingface_hub compares the length                   |
| right length, values or header altered              | error: wrong sha256; the file is removed from the cache      |
| altered in the cache                                | error: wrong sha256; the file is removed from the cache      |
| altered in a read-only cache                        | error that names the file; the file stays                    |
| file on the Hub has wrong shapes, wrong keys, NaN   | error: corrupted or of another network; a corrected file has |
| or a corrupted header                               | another sha256 and is downloaded                             |
| wrong keys, with another classifier or as features  | the same error; timm alone silently returns a random network |
| server stalls in the middle, once                   | right, after HF_HUB_DOWNLOAD_TIMEOUT                         |
| server stalls, always                               | error after 6 times that, and 5 s                            |
| server is slow, full cache                          | right, after HF_HUB_ETAG_TIMEOUT                             |
| no network, full cache                              | right                                                        |
| no network, empty cache                             | error after 23 s, at once with HF_HUB_OFFLINE=1              |
| read-only cache, full                               | right                                                        |
| read-only cache, empty                              | error: set another cache                                     |
| four processes at once                              | right, from one download                                     |
| four at once, altered during the download once      | right or error in each, never wrong weights                  |

For a `hf-hub:` name, timm downloads config.json before our code runs. Errors of this download come from
huggingface_hub. After a 404, 401 or 403 the error names the repository in a URL, and not always a remedy. Without a
network and a cache it names a remedy, but no repository. For a read-only cache it is a PermissionError that names the
folder.

Not detected: altered values in a file whose sha256 is not in the cache. This is the case for small files, which are in
git, and on file systems without links (HF_HUB_DISABLE_SYMLINKS=1).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from conftest import TIMM_REPO
from hub import Fault, hub
from safetensors.torch import load_file, save_file

NET = 'hf-hub:org/net'
NOWHERE = 'http://127.0.0.1:9'  # no server
NOBODY = 65534

# Forks a process for each try. The parent has imported the slow modules that do not read settings of huggingface_hub.
RUNNER = """
import encodings.idna, gc, json, os, sys, torch, torchvision
from safetensors.torch import load_file

gc.disable()  # a collection writes to all memory, so each process would copy it: half of the time of a try

def attempt(name, kwargs, expected):
    try:
        model = timm.create_model(name, pretrained=True, **kwargs)
    except Exception as e:
        return f'{type(e).__name__}: {e}'
    state = model.state_dict()
    right = all(torch.equal(state[key], value) for key, value in load_file(expected).items())
    cfg = model.pretrained_cfg
    untouched = 'file' not in cfg and cfg.get('source') == ('hf-hub' if name.startswith('hf-hub:') else None)
    return 'right' if right and untouched else 'wrong'

for line in sys.stdin:
    for job in json.loads(line):
        if not os.fork():
            os.environ.update(job['env'])
            import timm
            with open(job['result'], 'w') as f:
                if job['uid']:
                    os.setgroups([])
                    os.setgid(job['uid'])
                    os.setuid(job['uid'])
                f.write(attempt(job['name'], job['kwargs'], job['expected']))
            os._exit(0)
    for _ in json.loads(line):
        os.wait()
    print(flush=True)
"""


@pytest.fixture(scope='module')
def files(theirs):
    """Files with the right weights for each name, under our keys, readable for all users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        torch.manual_seed(0)
        state = timm.create_model('sknet12').state_dict()
        # Values that float16 can represent, so that a float16 file gives the same network.
        small = {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}
        save_file(small, f'{folder}/small.safetensors')
        sknet50 = timm.create_model('sknet50')
        sknet50.load_state_dict(theirs.state_dict())
        save_file(sknet50.state_dict(), f'{folder}/sknet50.safetensors')
        for file in Path(folder).iterdir():
            file.chmod(0o644)
        yield {NET: f'{folder}/small.safetensors', 'sknet50': f'{folder}/sknet50.safetensors'}


@pytest.fixture(scope='module')
def tries(files, tmp_path_factory):
    """Creates several models at once, each in a process; returns 'right', 'wrong' or the error for each."""
    folder = tmp_path_factory.mktemp('tries')
    env = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
    runner = subprocess.Popen(
        [sys.executable, '-c', RUNNER],
        env={**env, 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1'},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def run(*jobs):
        for i, job in enumerate(jobs):
            job['result'] = str(folder / str(i))
            Path(job['result']).unlink(missing_ok=True)
            job['expected'] = files[job['name'].partition('@')[0]]
        print(json.dumps(jobs), file=runner.stdin, flush=True)
        assert runner.stdout.readline() == '\n'
        return [(folder / str(i)).read_text() for i in range(len(jobs))]

    with runner:
        yield run
        runner.stdin.close()


def job(address, home, name=NET, uid=0, env=None, **kwargs):
    env = {'HF_ENDPOINT': address, 'HF_HOME': str(home), **(env or {})}
    return dict(name=name, env=env, uid=uid, kwargs=kwargs)


@pytest.fixture
def load(tries):
    """Creates one model in a process."""
    return lambda *args, **kwargs: tries(job(*args, **kwargs))[0]


@pytest.fixture
def net(files, tmp_path):
    """A folder for the server that contains the repository of a small network."""
    repository = tmp_path / 'hub' / 'org' / 'net'
    repository.mkdir(parents=True)
    cfg = dict(input_size=[3, 32, 32], num_classes=10, first_conv='stem.conv', classifier='head.fc')
    config = dict(architecture='sknet12', num_classes=10, pretrained_cfg=cfg)
    (repository / 'config.json').write_text(json.dumps(config))
    (repository / 'model.safetensors').write_bytes(Path(files[NET]).read_bytes())
    return tmp_path / 'hub'


def is_error(outcome, cause, remedy, repository='org/net'):
    return re.fullmatch(
        rf'RuntimeError: Cannot load weights from {repository} on the Hub: .*({cause}).*\. .*({remedy}).*\.', outcome
    )


def alter_values(data):
    return data[:-1000] + bytes(1000)


def alter_header(data):
    return data[:8] + bytes(20) + data[28:]


FAULTS = {
    'no file': (lambda: Fault(404, 'EntryNotFound', method=''), '404 .*Entry Not Found', 'Check the name'),
    'no repository': (lambda: Fault(404, 'RepoNotFound', method=''), '404 .*Repository Not Found', 'Check the name'),
    'private': (lambda: Fault(401, method=''), '401', 'hf auth login'),
    'gated': (lambda: Fault(403, 'GatedRepo', method=''), '403 .*gated', 'hf auth login'),
    'server error': (lambda: Fault(500), '500', 'try again later'),
    'overload': (lambda: Fault(503, times=1), '503', 'try again later'),
    'overload for metadata': (lambda: Fault(503, method='HEAD', times=1), '', ''),
    'cut': (lambda: Fault(stop=500_000, times=1), '', ''),
    'reset': (lambda: Fault(stop=500_000, times=1, reset=True), 'reset by peer', 'Try again'),
    'stall': (lambda: Fault(stop=500_000, times=1, delay=3), '', ''),
    'short': (lambda: Fault(body=lambda data: data[:-1000]), 'should be of size', 'Try again'),
    'altered values': (lambda: Fault(body=alter_values), 'altered .*sha256', 'Try again'),
    'altered header': (lambda: Fault(body=alter_header), 'altered .*sha256', 'Try again'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_network_fault_ends_in_right_weights_or_an_error_and_does_not_spoil_the_cache(load, net, tmp_path, name):
    make, cause, remedy = FAULTS[name]
    fault = make()
    with hub(net, fault) as address:
        outcome = load(address, tmp_path / 'home', env={'HF_HUB_DOWNLOAD_TIMEOUT': '1'})
    assert is_error(outcome, cause, remedy) if cause else outcome == 'right'
    assert any(fault.method in (method, '') for method, _ in fault.seen)
    with hub(net) as address:
        assert load(address, tmp_path / 'home') == 'right'


def spoil(kind, state):
    key = next(key for key in state if state[key].ndim == 4 and state[key].shape[1] > 3)
    if kind == 'shapes':
        state[key] = state[key][:, :1].contiguous()
    elif kind == 'keys':
        state = {f'module.net.{key}': value for key, value in state.items()}
    else:
        state[key][0, 0, 0, 0] = float(kind)
    return state


@pytest.mark.parametrize(
    ('kind', 'kwargs', 'cause'),
    [
        ('shapes', {}, 'size mismatch'),
        ('keys', {}, 'Missing keys'),
        ('keys', dict(num_classes=5), 'Missing keys'),
        ('keys', dict(features_only=True), 'Missing keys'),
        ('nan', {}, 'NaN or infinity'),
        ('-inf', dict(num_classes=5), 'NaN or infinity'),
        ('header', {}, 'header'),
    ],
)
def test_a_bad_file_on_the_hub_ends_in_an_error_until_it_is_corrected(load, net, tmp_path, kind, kwargs, cause):
    file = net / 'org/net/model.safetensors'
    good = file.read_bytes()
    if kind == 'header':
        file.write_bytes(alter_header(good))
    else:
        save_file(spoil(kind, load_file(file)), file)
    with hub(net) as address:
        outcome = load(address, tmp_path / 'home', **kwargs)
        assert is_error(outcome, cause, 'the file on the Hub is corrupted or belongs to another network')
        file.write_bytes(good)
        assert load(address, tmp_path / 'home') == 'right'


def blobs(cache):
    return [path for path in cache.glob('models--*/blobs/*') if len(path.name) == 64]


@pytest.mark.parametrize('where', ['HF_HOME', 'HF_HUB_CACHE', 'cache_dir', 'revision', 'filename', 'store of Xet'])
def test_an_altered_file_in_the_cache_is_refused_and_removed(load, net, tmp_path, where):
    cache = tmp_path / 'cache'
    kwargs = {'env': {'HF_HUB_CACHE': str(cache)}}
    if where == 'HF_HOME':
        cache, kwargs = tmp_path / 'home' / 'hub', {}
    elif where == 'cache_dir':
        kwargs = {'cache_dir': str(cache)}
    elif where == 'revision':
        kwargs['name'] = f'{NET}@v1.0'
    elif where == 'filename':
        repository = net / 'org/net'
        (repository / 'model.safetensors').rename(repository / 'best.safetensors')
        kwargs['pretrained_cfg_overlay'] = dict(hf_hub_filename='best.safetensors')
    with hub(net) as address:
        assert load(address, tmp_path / 'home', **kwargs) == 'right'
        [blob] = blobs(cache)
        good = blob.read_bytes()
        if where == 'store of Xet':  # there the file is named by another hash
            store = cache / 'blobs' / 'ff' / ('f' * 64)
            store.parent.mkdir(parents=True)
            blob.rename(store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
            assert load(address, tmp_path / 'home', **kwargs) == 'right'
        blob.write_bytes(alter_values(good))
        outcome = load(address, tmp_path / 'home', **kwargs)
        assert is_error(outcome, 'altered .*sha256', 'Try again', 'org/net(@v1.0)?')
        assert blobs(cache) == list(cache.glob('blobs/*/*')) == []
        assert load(address, tmp_path / 'home', **kwargs) == 'right'
        assert blobs(cache)[0].read_bytes() == good


def test_a_file_in_half_precision_loads_in_a_cache_without_links_too(load, net, tmp_path):
    file = net / 'org/net/model.safetensors'
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    with hub(net) as address:
        assert load(address, tmp_path / 'home') == 'right'
        assert load(address, tmp_path / 'other', env={'HF_HUB_DISABLE_SYMLINKS': '1'}) == 'right'


def test_a_full_cache_is_enough_without_a_network_or_with_a_slow_one(load, net, tmp_path):
    with hub(net) as address:
        assert load(address, tmp_path) == 'right'
    assert load(NOWHERE, tmp_path) == 'right'
    assert load(NOWHERE, tmp_path, env={'HF_HUB_OFFLINE': '1'}) == 'right'
    slow = Fault(method='HEAD', delay=3)
    with hub(net, slow) as address:
        assert load(address, tmp_path, env={'HF_HUB_ETAG_TIMEOUT': '1'}) == 'right'
    assert slow.seen


@contextmanager
def read_only(folder):
    """Makes a folder read-only; yields the user id for which it is so: root can write in any mode."""
    folders = [folder, *(path for path in folder.rglob('*') if path.is_dir() and not path.is_symlink())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield 0 if os.getuid() else NOBODY
    finally:
        for path in folders:
            path.chmod(0o755)


@pytest.fixture
def shared():
    """A folder that all users can access, which the folders of pytest do not allow."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_read_only_cache(load, net, repo, shared):
    with hub(repo) as address, read_only(shared) as uid:
        outcome = load(address, shared / 'home', 'sknet50', uid)
    assert is_error(outcome, 'Permission denied', 'HF_HUB_CACHE', TIMM_REPO)
    with hub(net) as address:
        assert load(address, shared / 'home') == 'right'
        with read_only(shared) as uid:
            assert load(address, shared / 'home', uid=uid) == 'right'
            [blob] = blobs(shared / 'home' / 'hub')
            blob.write_bytes(alter_values(blob.read_bytes()))
            outcome = load(address, shared / 'home', uid=uid)
            assert is_error(outcome, f'altered .*{blob}', 'Try again')
            assert blob.exists()
        assert is_error(load(address, shared / 'home'), 'altered', 'Try again')
        assert load(address, shared / 'home') == 'right'


def test_four_processes_at_once_share_one_download(tries, net, tmp_path):
    count = Fault()
    with hub(net, count) as address:
        assert tries(*[job(address, tmp_path) for _ in range(4)]) == ['right'] * 4
    assert [method for method, _ in count.seen].count('GET') == 1


def test_four_processes_at_once_never_load_an_altered_file(tries, load, net, tmp_path):
    with hub(net, Fault(body=alter_values, times=1)) as address:
        outcomes = tries(*[job(address, tmp_path) for _ in range(4)])
        assert any(is_error(outcome, 'altered', 'Try again') for outcome in outcomes)
        assert all(
            outcome == 'right' or outcome.startswith('RuntimeError: Cannot load weights from') for outcome in outcomes
        )
        assert load(address, tmp_path) == 'right'


@pytest.mark.parametrize(
    ('kwargs', 'error'),
    [
        (dict(no_such_argument=1), 'TypeError'),
        (dict(branches=[]), 'ValueError'),
        (dict(features_only=True, out_indices=[9]), 'IndexError'),  # raised by timm after the weights are loaded
        (dict(device='no such device'), 'RuntimeError: Invalid device string'),
    ],
)
def test_errors_of_other_arguments_are_unchanged(load, net, tmp_path, kwargs, error):
    with hub(net) as address:
        assert load(address, tmp_path, **kwargs).startswith(error)


def test_errors_before_our_code_runs_are_huggingface_hubs(load, net, tmp_path):
    with hub(net, Fault(404, 'RepoNotFound', method='', file='config.json')) as address:
        assert re.match('RepositoryNotFoundError(.|\n)*org/net', load(address, tmp_path))
    assert load(NOWHERE, tmp_path, env={'HF_HUB_OFFLINE': '1'}).startswith('LocalEntryNotFoundError')
    with hub(net) as address:
        assert load(address, tmp_path) == 'right'


def test_sknet50(load, repo, theirs, tmp_path):
    bad = tmp_path / TIMM_REPO / 'model.safetensors'
    bad.parent.mkdir(parents=True)
    save_file(spoil('keys', theirs.state_dict()), bad)
    home = tmp_path / 'home'

    def failed(address, cause, remedy, **kwargs):
        return is_error(load(address, home, 'sknet50', **kwargs), cause, remedy, TIMM_REPO)

    assert failed(NOWHERE, 'offline mode', 'local-dir', env={'HF_HUB_OFFLINE': '1'})
    with hub(repo, Fault(404, 'EntryNotFound', method='')) as address:
        assert failed(address, '404', 'Check the name')
    with hub(tmp_path) as address:
        assert failed(address, 'Missing keys', 'to another network')
        assert failed(address, 'Missing keys', 'to another network', num_classes=5)
    with hub(repo, Fault(body=alter_values)) as address:
        assert failed(address, 'altered', 'Try again')
    cut = Fault(stop=60_000_000, times=1)
    with hub(repo, cut) as address:
        assert load(address, home, 'sknet50') == 'right'
    assert [requested for _, requested in cut.seen] == ['', '', 'bytes=52428800-']


@pytest.mark.slow
def test_permanent_faults_end_in_an_error_within_half_a_minute(tries, net, repo, tmp_path):
    env = {'HF_HUB_DOWNLOAD_TIMEOUT': '1'}
    with (
        hub(net, Fault(500, method='')) as error,
        hub(net, Fault(stop=500_000)) as cut,
        hub(net, Fault(stop=0, delay=3)) as slow,
    ):
        outcomes = tries(
            job(NOWHERE, tmp_path / '1', 'sknet50'),
            job(error, tmp_path / '2'),
            job(cut, tmp_path / '3'),
            job(slow, tmp_path / '4', env=env),
        )
    assert is_error(outcomes[0], 'Connection refused', 'cannot be reached', TIMM_REPO)
    assert is_error(outcomes[1], '500', 'try again')
    assert is_error(outcomes[2], 'closed connection', 'Try again')
    assert is_error(outcomes[3], 'timed out', 'Try again')
