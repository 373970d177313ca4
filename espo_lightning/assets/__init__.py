"""The bundled policies, as paths; the README says how they were made."""

from pathlib import Path

SUDOKU = str(Path(__file__).parent / "sudoku")
COUNTDOWN = str(Path(__file__).parent / "countdown")
