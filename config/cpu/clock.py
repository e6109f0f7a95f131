"""Step times in processor time, since two cores are rarely quiet; each row trains on one thread."""

threads = 1
clock = "cpu"
turns = 24
