"""Prints the entries of the archives that are named as arguments, one a line, as Python's tarfile sees them."""
import decimal
import math
import sys
import tarfile
import zlib


def hexed(text):
    return text.encode("utf-8", "surrogateescape").hex() or "-"


KINDS = {
    tarfile.LNKTYPE: "HardLink",
    tarfile.SYMTYPE: "Symlink",
    tarfile.CHRTYPE: "CharDevice",
    tarfile.BLKTYPE: "BlockDevice",
    tarfile.DIRTYPE: "Directory",
    tarfile.FIFOTYPE: "Fifo",
}

for place, path in enumerate(sys.argv[1:]):
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as archive:
        for entry in archive:
            kind = "Regular" if entry.isreg() else KINDS[entry.type]
            link = entry.linkname if entry.islnk() or entry.issym() else ""
            size = entry.size if entry.isreg() else 0
            crc = zlib.crc32(archive.extractfile(entry).read()) if entry.isreg() else 0
            mtime = decimal.Decimal(entry.pax_headers.get("mtime", int(entry.mtime)))
            seconds = math.floor(mtime)
            nanoseconds = int((mtime - seconds) * 10**9)
            device = (entry.devmajor, entry.devminor) if kind.endswith("Device") else (0, 0)
            prefix = "SCHILY.xattr."
            xattrs = sorted(
                hexed(name[len(prefix):]) + "=" + hexed(value)
                for name, value in entry.pax_headers.items()
                if name.startswith(prefix)
            )
            print(
                place, kind, hexed(entry.name.rstrip("/")), hexed(link), size, oct(entry.mode & 0o7777)[2:],
                entry.uid, entry.gid, hexed(entry.uname), hexed(entry.gname), f"{seconds}.{nanoseconds:09}",
                *device, crc, ",".join(xattrs) or "-",
            )
