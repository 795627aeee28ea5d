"""Reads random files of a mount, in the ways programs do, and compares them with the truth until it is told to stop.

Arguments: the mount, the truth, a seed, a file whose existence means stop, and one whose existence, when a read begins,
means that it may fail with EIO; a file beside that, with the ending `met`, is made when one did. Prints a line when it
begins, and the number of right reads at the end.
"""
import errno
import mmap
import os
import random
import sys

mount, truth, seed, stop, lenient = sys.argv[1:]
random.seed(int(seed))
files = []
for directory, _, names in os.walk(truth):
    for name in names:
        path = os.path.join(directory, name)
        if not os.path.islink(path) and os.path.isfile(path) and os.path.getsize(path) > 0:
            files.append(os.path.relpath(path, truth))

print("reading", flush=True)
reads = 0
while not os.path.exists(stop):
    name = random.choice(files)
    with open(os.path.join(truth, name), "rb") as file:
        expected = file.read()
    start = random.randrange(len(expected))
    end = min(len(expected), start + random.choice([1, 4096, 70000, 1 << 22]))
    may_fail = os.path.exists(lenient)
    try:
        with open(os.path.join(mount, name), "rb", buffering=0) as file:
            if random.random() < 0.5:
                found = os.pread(file.fileno(), end - start, start)
                while 0 < len(found) < end - start:
                    found += os.pread(file.fileno(), end - start - len(found), start + len(found))
            elif may_fail:
                # A mapping cannot return an error.
                continue
            else:
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    found = mapped[start:end]
    except OSError as error:
        if may_fail and error.errno == errno.EIO:
            open(lenient + ".met", "w").close()
            continue
        sys.exit(f"{name} at {start}: {error}")
    if found != expected[start:end]:
        wrong = [n for n in range(min(len(found), end - start)) if found[n] != expected[start + n]]
        zeros = all(found[n] == 0 for n in wrong)
        first, last = (start + wrong[0], start + wrong[-1]) if wrong else (start + len(found), end)
        what = "zeros" if zeros else "other bytes"
        sys.exit(f"{name} read at {start}..{end} ({len(found)} bytes): {what} from {first} to {last}")
    reads += 1
print(reads)
