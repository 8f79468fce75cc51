"""The fence: only the newest process group of a supervised stage may commit a checkpoint.

After a failure the supervisor starts a new process group while a process of the old group may still
be alive, for example on a host that was unreachable for a while. The supervisor writes the number
of the new group, its generation, into a file of the run directory before the group starts. A group
whose own number is not in the file has been replaced.

The file is read through open(), never looked up: on NFS only open() asks the server, while
exists() may answer from a cache of several seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StageError


@dataclass(frozen=True)
class Fence:
    """The fence as one process sees it.

    ``path`` is the generation file. ``generation`` is this group's number, None without a
    supervisor: then nothing can replace this process, and there is no file.
    """

    path: Path
    generation: int | None

    def may_commit(self) -> bool:
        """True if this process group is the newest one.

        False too if the file is missing. Without the file nobody knows which group is the newest,
        and a checkpoint of a replaced group could overwrite a newer one.
        """
        if self.generation is None:
            return True
        try:
            newest = self.path.read_text().strip()
        except FileNotFoundError:
            # Fail closed. The supervisor writes the file before it starts a group, so somebody
            # deleted it, and a newer group may exist.
            return False
        return newest == str(self.generation)

    def require_file(self) -> None:
        """Check that the generation file exists.

        Raises:
            StageError: it is missing although a supervisor started this process.
        """
        if self.generation is None:
            return
        try:
            self.path.read_text()
        except FileNotFoundError:
            raise StageError(
                "the generation file is missing, so this process group may not commit results",
                place=str(self.path),
                remedy="rerun the same command: it writes the file and resumes from the last "
                "checkpoint; find out what deleted the file",
            ) from None
