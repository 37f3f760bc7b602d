"""Imported before a script (see forks.py), it lets it wait only a 200th of the time between two tries."""
import time

sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 200)
