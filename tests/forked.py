"""Processes of the tests that start in a moment: a server, which has imported everything, forks them."""

import multiprocessing
import os

from workers import work

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["forked", "scripted", "stub_server"])

Pipe = context.Pipe


def work_for_the_server(connection, weights, setup, parent: int) -> None:
    """A rollout worker ends with what has forked it."""
    work(connection, weights, setup, os.getppid())


def Process(target, **more):
    return context.Process(target=work_for_the_server if target is work else target, **more)
