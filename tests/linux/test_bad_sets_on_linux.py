"""Bad sets on real processes: each one that is tried is left by itself, in time, and is explained.

One device for the whole file, set up once. Its sets are one build with a few files changed, and each
is tried once. Afterwards `nexus why` names the service at fault and shows its last words, the
data and the slot that was good are as before, and what runs is the old set.
"""
