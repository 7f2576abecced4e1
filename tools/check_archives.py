"""Checks the wheel and the sdist in dist/: valid metadata, no missing files, and no unexpected files."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

listed = subprocess.check_output(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], text=True)
ours = {name for name in listed.splitlines() if not name.startswith('.')}
installed = {name for name in ours if name.startswith(('timm_sknet/', '_timm_sknet_autoload'))}

(wheel,) = Path('dist').glob('*.whl')
(sdist,) = Path('dist').glob('*.tar.gz')
with zipfile.ZipFile(wheel) as archive:
    in_wheel = set(archive.namelist())
    (metadata,) = (name for name in in_wheel if name.endswith('.dist-info/METADATA'))
    Metadata.from_email(archive.read(metadata), validate=True)
with tarfile.open(sdist) as archive:
    in_sdist = {name.partition('/')[2] for name in archive.getnames()}

wrong = {
    'missing in the wheel': installed - in_wheel,
    'unexpected in the wheel': {name for name in in_wheel - installed if '.dist-info/' not in name},
    'missing in the sdist': ours - in_sdist,
}
for problem, names in wrong.items():
    for name in sorted(names):
        print(f'{problem}: {name}')
if any(wrong.values()):
    sys.exit(1)
