"""What is promoted where, by whom, and with which proof: everything of modelkeep begins by reading it."""

import os

from registry import untracked

untracked.settle(
    os.environ
)  # here, since every program, flow and test of ours passes by before it imports a library that reports
