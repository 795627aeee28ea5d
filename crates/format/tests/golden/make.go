// Makes the blobs beside this file with containerd's own library (package
// golang-github-containerd-stargz-snapshotter-dev of Debian 12):
//
//	GO111MODULE=off GOPATH=/usr/share/gocode go run make.go .
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"
)

type ent struct {
	h tar.Header
	c string
}

func mk(es []ent) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range es {
		e.h.Size = int64(len(e.c))
		if e.h.ModTime.IsZero() {
			e.h.ModTime = time.Unix(1700000000, 0)
		}
		e.h.Format = tar.FormatPAX
		if err := w.WriteHeader(&e.h); err != nil {
			panic(err)
		}
		io.WriteString(w, e.c)
	}
	w.Close()
	b.Write(make([]byte, 100))
	return b.Bytes()
}

func various(p string) []ent {
	return []ent{
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "baz.txt", Mode: 04755, Uid: 1000, Gid: 1001, Uname: "user", Gname: "group"}, "bazbazbazbazbazbazbaz"},
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "foo1.txt", Mode: 0644}, "a"},
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "bar/foo2.txt", Mode: 0644, ModTime: time.Unix(0, 0)}, "b"},
		{tar.Header{Typeflag: tar.TypeSymlink, Name: p + "barlink", Linkname: "test/bar.txt", Mode: 0777}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: p + "test/", Mode: 01777}, ""},
		{tar.Header{Typeflag: tar.TypeDir, Name: p + "dev/", Mode: 0755}, ""},
		{tar.Header{Typeflag: tar.TypeBlock, Name: p + "dev/testblock", Devmajor: 3, Devminor: 4, Mode: 0600}, ""},
		{tar.Header{Typeflag: tar.TypeFifo, Name: p + "dev/testfifo", Mode: 0600}, ""},
		{tar.Header{Typeflag: tar.TypeChar, Name: p + "dev/testchar", Devmajor: 5, Devminor: 6, Mode: 0600}, ""},
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "test/bar.txt", Mode: 0600, PAXRecords: map[string]string{"SCHILY.xattr.user.test": "sample", "SCHILY.xattr.user.empty": "", "SCHILY.xattr.user.bytes": "\xff\xfe\xfd"}}, "testbartestbar"},
		{tar.Header{Typeflag: tar.TypeDir, Name: p + "test2/", Mode: 0755}, ""},
		{tar.Header{Typeflag: tar.TypeLink, Name: p + "test2/bazlink", Linkname: p + "baz.txt", Mode: 0644}, ""},
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "<&>\u2028\u2029\"\\\n\t\x01\x7f\u00e9", Mode: 0644}, "odd name"},
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "latin1-\xe9\xe8-\xf0\x9f.txt", Mode: 0644}, "name that is not UTF-8"},
		{tar.Header{Typeflag: tar.TypeReg, Name: p + "empty", Mode: 0644, ModTime: time.Unix(-1, 0)}, ""},
	}
}

func build(es []ent, opts ...estargz.Option) []byte {
	t := mk(es)
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(t), 0, int64(len(t))), opts...)
	if err != nil {
		panic(err)
	}
	d, err := io.ReadAll(b)
	if err != nil {
		panic(err)
	}
	fmt.Println("toc", b.TOCDigest())
	return d
}

type legacy struct{ *estargz.GzipCompressor }

func (l legacy) WriteTOCAndFooter(w io.Writer, off int64, toc *estargz.JTOC, h hash.Hash) (digest.Digest, error) {
	for _, e := range toc.Entries {
		e.Digest, e.ChunkDigest = "", ""
	}
	j, _ := json.MarshalIndent(toc, "", "\t")
	gz := gzip.NewWriter(w)
	tw := tar.NewWriter(gz)
	tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: int64(len(j))})
	tw.Write(j)
	tw.Close()
	gz.Close()
	f, _ := gzip.NewWriterLevel(w, gzip.NoCompression)
	f.Header.Extra = []byte(fmt.Sprintf("%016xSTARGZ", off))
	f.Close()
	return digest.FromBytes(j), nil
}

func main() {
	for name, d := range map[string][]byte{
		"various.esgz":  build(various(""), estargz.WithChunkSize(4), estargz.WithPrioritizedFiles([]string{"test/bar.txt", "foo1.txt"})),
		"dotslash.esgz": build(various("./")),
		"dotdot.esgz":   build(append([]ent{{tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0700}, ""}}, various("../")...)),
		"empty.esgz":    build(nil),
	} {
		os.WriteFile(os.Args[1]+"/"+name, d, 0644)
	}
	var b bytes.Buffer
	w := estargz.NewWriterWithCompressor(&b, legacy{estargz.NewGzipCompressor()})
	w.ChunkSize = 8
	if err := w.AppendTar(bytes.NewReader(mk(various("")))); err != nil {
		panic(err)
	}
	d, err := w.Close()
	if err != nil {
		panic(err)
	}
	fmt.Println("legacy", d)
	os.WriteFile(os.Args[1]+"/legacy.stargz", b.Bytes(), 0644)
	b.Reset()
	w = estargz.NewWriter(&b)
	d, _ = w.Close()
	fmt.Println("no entries", d)
	os.WriteFile(os.Args[1]+"/no-entries.esgz", b.Bytes(), 0644)
}
