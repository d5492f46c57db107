"""`lowrank compare`: many methods on the same data, seeds and schedule, in one folder.

`entries` reads the list of methods, `setting` says what all runs have in common, `plan` turns both
into configurations of `lowrank pretrain`, `pool` runs them, `tuning` searches the grid, `results`
reads the runs and `report.compare_page` draws them.
"""
