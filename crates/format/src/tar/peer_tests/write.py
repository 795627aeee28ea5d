"""Writes, into the directory that is named as argument, one archive of made-up entries in each format of tarfile."""
import io
import os
import sys
import tarfile

for name, form in [("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)]:
    path = os.path.join(sys.argv[1], name + ".tar")
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as archive:

        def put(name, type=tarfile.REGTYPE, content=b"", **fields):
            entry = tarfile.TarInfo(name)
            entry.type = type
            entry.size = len(content)
            for field, value in fields.items():
                setattr(entry, field, value)
            archive.addfile(entry, io.BytesIO(content))

        put("plain", content=b"content", mode=0o755, uid=1, gid=2, uname="root", gname="wheel", mtime=1_500_000_000)
        put("v7", tarfile.AREGTYPE, b"old")
        put("contiguous", tarfile.CONTTYPE, b"all in one place")
        put("d" * 90 + "/" + "n" * 90, content=b"prefix")
        put("directory", tarfile.DIRTYPE, mode=0o1777)
        put("link", tarfile.SYMTYPE, linkname="plain")
        put("hard", tarfile.LNKTYPE, linkname="plain")
        put("null", tarfile.CHRTYPE, devmajor=1, devminor=3)
        put("disk", tarfile.BLKTYPE, devmajor=259, devminor=70_000)
        put("fifo", tarfile.FIFOTYPE)
        if form != tarfile.USTAR_FORMAT:
            put("n" * 300, content=b"long")
            put("long-link", tarfile.SYMTYPE, linkname="l" * 300)
            put("l" * 300, tarfile.LNKTYPE, linkname="n" * 300)
            put("b\udcff\udcfe", content=b"bytes", uid=1 << 31, gid=(1 << 32) - 2, uname="\u00e4")
        if form == tarfile.GNU_FORMAT:
            put("before-the-epoch", mtime=-1_000_000)
        if form == tarfile.PAX_FORMAT:
            xattrs = {"SCHILY.xattr.user.a": "v=\n", "SCHILY.xattr.user.empty": "", "comment": "x"}
            put("records", content=b"x", mtime=1.5, pax_headers=xattrs)
