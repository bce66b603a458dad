"""The one thing that setup.cfg cannot say: the package carries a file from beside `src/`.

`model_card_template.md` is where people look for it. A link in the package would become a text of
a few bytes in a checkout on Windows, and a second copy would have to be kept in step.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TEMPLATE = "model_card_template.md"


class BuildWithTemplate(build_py):
    """Copies the template into the package that is built."""

    def run(self) -> None:
        """Build, and copy the template; an editable install finds it where it is."""
        super().run()
        if not self.editable_mode:
            self.copy_file(TEMPLATE, str(Path(self.build_lib, "simcse_trainer", TEMPLATE)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return what is built, the template among it."""
        found: list[str] = super().get_outputs(include_bytecode)
        return [*found, str(Path(self.build_lib, "simcse_trainer", TEMPLATE))]


setup(cmdclass={"build_py": BuildWithTemplate})
