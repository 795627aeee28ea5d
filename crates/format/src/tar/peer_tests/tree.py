"""Makes, in the directory that is named as argument, a tree with something of everything that needs no rights."""
import os
import sys

os.chdir(sys.argv[1])


def put(path, content, mode=0o644):
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)


os.mkdir("directory", 0o755)
os.mkdir("sticky")
os.chmod("sticky", 0o1777)
put("empty", b"")
put("small", b"content\n")
put("block", b"b" * 512, 0o4755)
put("blocks", bytes(range(256)) * 300)
put("n" * 100, b"full")
put("directory/" + "n" * 150, b"long")
deep = "/".join(["d" * 60] * 5)
os.makedirs(deep)
put(deep + "/file", b"deep")
put("\u00e4\u4e2d", b"utf-8")
put(b"\xff\xfe", b"bytes")
put("space and\nnewline", b"odd")
os.symlink("small", "link")
os.symlink("l" * 200, "long-link")
os.symlink("../\u00e4", "odd-link")
os.link("small", "hard-link")
os.link("directory/" + "n" * 150, "hard-link-to-a-long-name")
os.mkfifo("fifo", 0o600)

with open("sparse", "wb") as file:
    for place in range(40):
        file.seek(place * 65536 + 4096)
        file.write(b"data %d" % place)
    file.truncate(40 * 65536)
with open("all-hole", "wb") as file:
    file.truncate(1 << 20)
with open("ends-in-data", "wb") as file:
    file.seek(1 << 20)
    file.write(b"end")

for place, path in enumerate(sorted(os.listdir(b"."))):
    os.utime(path, ns=(0, (1_500_000_000 + place) * 10**9 + 123_456_789 * (place % 3)), follow_symlinks=False)
os.utime("empty", ns=(0, -1_500_000_000))

try:
    os.setxattr("small", "user.one", b"1=\n")
    os.setxattr("small", "user.empty", b"")
    os.setxattr("directory", "user.\u00e4", bytes(range(256)))
except OSError:
    print("no xattrs")
