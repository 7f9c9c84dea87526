"""A small disk that can be filled to the brim: a tmpfs, which only root can mount."""

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SIZE_MB = 64
CHUNK = bytes(1 << 20)


class SmallDisk:
    """Mounted at `path` by `mount`, if that is possible; `why_not` says why it is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.why_not = ""
        self._is_mounted = False

    def mount(self) -> None:
        self.path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "media-tasks-chaos", str(self.path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as exc:
            self.why_not = f"mount: {exc.strerror}"
            return
        self._is_mounted = done.returncode == 0
        self.why_not = "" if self._is_mounted else f"only root can mount one ({done.stderr.strip()})"

    def unmount(self) -> None:
        if self._is_mounted:
            subprocess.run(["umount", "--lazy", str(self.path)], capture_output=True, check=False)
            self._is_mounted = False

    def fill(self, hold: Callable[[], object]) -> None:
        """Leave no byte free while `hold` waits."""
        filler = self.path / "filler"
        fd = os.open(filler, os.O_CREAT | os.O_WRONLY)
        try:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while os.write(fd, CHUNK[:size]):
                        pass
            hold()
        finally:
            os.close(fd)
            filler.unlink()
