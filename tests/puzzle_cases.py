"""Texts and answers of puzzles."""

from espo_lightning.tasks.sudoku import grids

NUMBERS, TARGET, RIGHT = (30, 100, 93), 23, "93+30-100"
PUZZLE, GRID = "0401002010030310", "2431312412434312"
OTHER = next(grid for grid in grids() if grid != GRID)
ROWS = [GRID[i : i + 4] for i in range(0, 16, 4)]
