"""What firmware, boot loader and hardware watchdog are on a board: which slot is booted, and again.

The loader belongs to the base system and to no set: it is what an update cannot break. `choose` is
pure over block devices, and the simulator asks it too. On Linux `main` stays beside init, small and
without our libraries; for each boot it forks a child that decides (`choose`), unpacks (`tree`) and
becomes init (`boots`). Imports stand in the modules, so that `main` has none of the others'.
"""
