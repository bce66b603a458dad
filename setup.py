"""The one thing that setup.cfg cannot say: the package carries files from beside `src/`.

`model_card_template.md` and `configs/` are where people look for them. A link in the package would
become a text of a few bytes in a checkout on Windows, and a second copy would have to be kept in
step.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = [Path("model_card_template.md"), *sorted(Path("configs").rglob("*.yaml"))]


class BuildWithCarried(build_py):
    """Copies these files into the package that is built."""

    def run(self) -> None:
        """Build, and copy the files; an editable install finds them where they are."""
        super().run()
        if not self.editable_mode:
            for source, target in self._carried():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return what is built, the carried files among it."""
        found: list[str] = super().get_outputs(include_bytecode)
        return [*found, *(str(target) for _, target in self._carried())]

    def _carried(self) -> list[tuple[Path, Path]]:
        return [(path, Path(self.build_lib, "simcse_trainer", path)) for path in CARRIED]


setup(cmdclass={"build_py": BuildWithCarried})
