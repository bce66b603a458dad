"""What tests share: nobody imports a test module."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
