#!/bin/sh
# Makes the golden layers of zstd:chunked. Needs python3, skopeo 1.22 (containers/storage 1.59) and, with a containerd that it can
# talk to, ctr-remote 0.14.3 (stargz-snapshotter):
#
#     sh zstd-chunked.sh DIRECTORY
#
# Writes zstd-containers.zst and zstd-stargz.zst, and beside each the annotations of its descriptor (.json).
set -eu
cd "$1"
python3 - <<'PYTHON'
import hashlib, io, json, os, tarfile

def entry(archive, name, kind=tarfile.REGTYPE, content=b"", **more):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, len(content), 0o644, 1700000000
    for key, value in more.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))

tar = io.BytesIO()
with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
    entry(archive, "etc/", tarfile.DIRTYPE, mode=0o755)
    entry(archive, "etc/hostname", content=b"lazy\n", mode=0o4755, uid=1000, gid=1001)
    entry(archive, "etc/empty")
    # In the middle of it, a hole; in front of it, text that is cut by its content.
    large = b"".join(b"%d\n" % number for number in range(30000))
    entry(archive, "usr/share/large", content=large + bytes(5000) + b"behind the hole")
    entry(archive, "usr/share/zeros", content=bytes(70000))
    entry(archive, "etc/link", tarfile.LNKTYPE, linkname="etc/hostname")
    entry(archive, "etc/symlink", tarfile.SYMTYPE, linkname="../usr/share/large", mode=0o777)
    entry(archive, "dev/fifo", tarfile.FIFOTYPE)
    entry(archive, "dev/char", tarfile.CHRTYPE, devmajor=5, devminor=6)
    entry(archive, "dev/block", tarfile.BLKTYPE, devmajor=3, devminor=4)
    entry(archive, "etc/attributes", content=b"x", pax_headers={"SCHILY.xattr.user.one": "value", "mtime": "1700000000.25"})
    entry(archive, "etc/.wh.gone")
    entry(archive, "a" * 120 + "/" + "b" * 120, content=b"long")
tar = tar.getvalue()

os.makedirs("in/blobs/sha256", exist_ok=True)
def blob(content, media_type):
    digest = hashlib.sha256(content).hexdigest()
    open(f"in/blobs/sha256/{digest}", "wb").write(content)
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(content)}
layer = blob(tar, "application/vnd.oci.image.layer.v1.tar")
config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}, "config": {}}
config = blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": [layer]}
manifest = blob(json.dumps(manifest).encode(), manifest["mediaType"])
manifest["annotations"] = {"org.opencontainers.image.ref.name": "x", "io.containerd.image.name": "localhost/x:x"}
json.dump({"schemaVersion": 2, "manifests": [manifest]}, open("in/index.json", "w"))
open("in/oci-layout", "w").write('{"imageLayoutVersion":"1.0.0"}')
PYTHON
skopeo --insecure-policy copy -q --dest-compress-format zstd:chunked --dest-force-compress-format oci:in:x oci:containers:x
if ctr version >/dev/null 2>&1; then
    tar -C in -cf in.tar .
    ctr image import --all-platforms in.tar
    ctr-remote image convert --oci --zstdchunked --zstdchunked-chunk-size 65536 localhost/x:x localhost/x:stargz
    ctr image export --all-platforms stargz.tar localhost/x:stargz
    mkdir -p stargz && tar -C stargz -xf stargz.tar
fi
python3 - <<'PYTHON'
import json, os, shutil
for name in ["containers", "stargz"]:
    if not os.path.exists(name):
        continue
    read = lambda digest: open(f"{name}/blobs/sha256/{digest[7:]}", "rb")
    manifest = json.load(read(json.load(open(f"{name}/index.json"))["manifests"][0]["digest"]))
    layer = manifest["layers"][0]
    shutil.copyfileobj(read(layer["digest"]), open(f"zstd-{name}.zst", "wb"))
    json.dump(layer["annotations"], open(f"zstd-{name}.json", "w"), indent=1, sort_keys=True)
PYTHON
