// Makes min-chunk.esgz out of dotslash.esgz with containerd's own library: several files and chunks in one gzip member. Debian 12's
// library can't yet (package golang-github-containerd-stargz-snapshotter-dev of sid, 0.18):
//
//	GO111MODULE=off GOPATH=/usr/share/gocode go run min-chunk.go
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/containerd/stargz-snapshotter/estargz"
)

func main() {
	f, err := os.Open("dotslash.esgz")
	if err != nil {
		panic(err)
	}
	size, _ := f.Seek(0, io.SeekEnd)
	b, err := estargz.Build(io.NewSectionReader(f, 0, size), estargz.WithChunkSize(8), estargz.WithMinChunkSize(400),
		estargz.WithPrioritizedFiles([]string{"test/bar.txt", "foo1.txt"}))
	if err != nil {
		panic(err)
	}
	d, err := io.ReadAll(b)
	if err != nil {
		panic(err)
	}
	if err := os.WriteFile("min-chunk.esgz", d, 0o644); err != nil {
		panic(err)
	}
	fmt.Println("toc", b.TOCDigest())
}
