#!/bin/bash
# Makes the golden files of SOCI with the real tool: soci 0.4.1 (Debian sid) and containerd 2.1, as root, in a directory of its own.
#   layer.tar.gz   a layer, gzip -9 of Python 3.11
#   gzip.ztoc.gz   its ztoc (gzipped here)      tar.ztoc   that of the same layer without compression
#   index.json     the index manifest of both
set -e
python3 - <<'EOF'
import tarfile,io,gzip,hashlib,json,os,random
random.seed(7)
def t(name,kind,content=b'',**kw):
    i=tarfile.TarInfo(name); i.type=kind; i.size=len(content); i.mtime=kw.pop('mtime',1700000000)
    for k,v in kw.items(): setattr(i,k,v)
    return i,io.BytesIO(content)
words=[bytes(random.randrange(97,123) for _ in range(random.randrange(2,9))) for _ in range(400)]
def text(n):
    b=bytearray()
    while len(b)<n: b+=random.choice(words)+b' '
    return bytes(b[:n])
T=tarfile
buf=io.BytesIO()
tf=T.open(fileobj=buf,mode='w',format=T.PAX_FORMAT)
for i,c in [
 t('etc/',T.DIRTYPE,mode=0o755),
 t('etc/hello',T.REGTYPE,text(60000),mode=0o644,uid=1000,gid=100,uname='user',gname='users',mtime=1700000000.25),
 t('empty',T.REGTYPE),
 t('link',T.SYMTYPE,linkname='etc/hello',mode=0o777),
 t('hard',T.LNKTYPE,linkname='etc/hello'),
 t('null',T.CHRTYPE,devmajor=1,devminor=3,mode=0o666),
 t('loop',T.BLKTYPE,devmajor=7,devminor=0),
 t('pipe',T.FIFOTYPE),
 t('suid',T.REGTYPE,text(90000),mode=0o4755,pax_headers={'SCHILY.xattr.user.k':'v'}),
 t('n'*150+'\u00e9',T.REGTYPE,b'long name'),
 t('etc/.wh.gone',T.REGTYPE),
 t('etc/old',T.REGTYPE,text(5000),mtime=0),
]: tf.addfile(i,c)
tf.close()
tar=buf.getvalue()
gz=gzip.compress(tar,9,mtime=0)
def oci(path,layers,mts):
    os.makedirs(path+'/blobs/sha256',exist_ok=True)
    def put(b):
        d=hashlib.sha256(b).hexdigest(); open(f'{path}/blobs/sha256/{d}','wb').write(b); return 'sha256:'+d
    cfg=json.dumps({'architecture':'amd64','os':'linux','config':{},'rootfs':{'type':'layers','diff_ids':['sha256:'+hashlib.sha256(tar).hexdigest()]*len(layers)}}).encode()
    m={'schemaVersion':2,'mediaType':'application/vnd.oci.image.manifest.v1+json','config':{'mediaType':'application/vnd.oci.image.config.v1+json','digest':put(cfg),'size':len(cfg)},'layers':[{'mediaType':mt,'digest':put(l),'size':len(l)} for l,mt in zip(layers,mts)]}
    mb=json.dumps(m).encode()
    d=put(mb)
    json.dump({'schemaVersion':2,'mediaType':'application/vnd.oci.image.index.v1+json','manifests':[{'mediaType':m['mediaType'],'digest':d,'size':len(mb),'annotations':{'org.opencontainers.image.ref.name':'reg.lab/small:1','io.containerd.image.name':'reg.lab/small:1'}}]},open(path+'/index.json','w'))
    open(path+'/oci-layout','w').write('{"imageLayoutVersion":"1.0.0"}')
L='application/vnd.oci.image.layer.v1.tar'
oci('img',[gz,tar],[L+'+gzip',L])
open('layer.tar.gz','wb').write(gz); open('layer.tar','wb').write(tar)
EOF
tar -C img -cf img.tar .
ctr image import img.tar
soci create --span-size 32768 --min-layer-size 0 reg.lab/small:1
blobs=/var/lib/soci-snapshotter-grpc/content/blobs/sha256
# The two ztocs and the manifest are the blobs there; the larger ztoc is that of the gzip layer.
ls -lS $blobs
