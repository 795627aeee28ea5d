// Command reference drives containerd/stargz-snapshotter's library, for comparison with what Loris writes.
//
//	reference build TAR BLOB CHUNK [FILE...]   makes a blob, prioritised files first; prints the digest of its TOC
//	reference open BLOB TOC-DIGEST             verifies the blob, reads every file of it, prints the tree
//
// Built with GO111MODULE=off and GOPATH=/usr/share/gocode (Debian: golang-github-containerd-stargz-snapshotter-dev).
package main

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	section, err := section(args[1])
	if err != nil {
		return err
	}
	switch args[0] {
	case "build":
		return build(section, args[2], args[3], args[4:])
	case "open":
		return open(section, args[2])
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func section(name string) (*io.SectionReader, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	return io.NewSectionReader(file, 0, info.Size()), nil
}

func build(tar *io.SectionReader, blob, chunk string, prioritised []string) error {
	size, err := strconv.Atoi(chunk)
	if err != nil {
		return err
	}
	built, err := estargz.Build(tar, estargz.WithChunkSize(size), estargz.WithPrioritizedFiles(prioritised))
	if err != nil {
		return err
	}
	out, err := os.Create(blob)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, built); err != nil {
		return err
	}
	if err := built.Close(); err != nil {
		return err
	}
	fmt.Println(built.TOCDigest())
	return out.Close()
}

func open(blob *io.SectionReader, toc string) error {
	reader, err := estargz.Open(blob)
	if err != nil {
		return err
	}
	verifier, err := reader.VerifyTOC(digest.Digest(toc))
	if err != nil {
		return err
	}
	root, ok := reader.Lookup("")
	if !ok {
		return nil
	}
	return walk(reader, verifier, "", root)
}

func walk(reader *estargz.Reader, verifier estargz.TOCEntryVerifier, name string, entry *estargz.TOCEntry) error {
	content := ""
	if entry.Type == "reg" {
		var err error
		if content, err = read(reader, verifier, name, entry); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
	keys := make([]string, 0)
	for key, value := range entry.Xattrs {
		keys = append(keys, key+"="+base64.StdEncoding.EncodeToString(value))
	}
	sort.Strings(keys)
	fmt.Printf("%q %s %o %d:%d %q:%q %q %d %s %d:%d %d %v %s\n", name, entry.Type, entry.Mode, entry.UID, entry.GID,
		entry.Uname, entry.Gname, entry.LinkName, entry.Size, entry.ModTime().UTC().Format("2006-01-02T15:04:05.999999999"),
		entry.DevMajor, entry.DevMinor, entry.NumLink, keys, content)
	children := map[string]*estargz.TOCEntry{}
	names := make([]string, 0)
	entry.ForeachChild(func(base string, child *estargz.TOCEntry) bool {
		children[base] = child
		names = append(names, base)
		return true
	})
	sort.Strings(names)
	for _, base := range names {
		if err := walk(reader, verifier, path.Join(name, base), children[base]); err != nil {
			return err
		}
	}
	return nil
}

// read reads a file chunk by chunk, each checked with the verifier, and once as a whole.
func read(reader *estargz.Reader, verifier estargz.TOCEntryVerifier, name string, entry *estargz.TOCEntry) (string, error) {
	file, err := reader.OpenFile(name)
	if err != nil {
		return "", err
	}
	// Chunks are known under the name of the entry that a hard link leads to.
	name = entry.Name
	for offset := int64(0); offset < entry.Size; {
		chunk, ok := reader.ChunkEntryForOffset(name, offset)
		if !ok {
			return "", fmt.Errorf("no chunk at %d", offset)
		}
		check, err := verifier.Verifier(chunk)
		if err != nil {
			return "", err
		}
		if _, err := io.Copy(check, io.NewSectionReader(file, chunk.ChunkOffset, chunk.ChunkSize)); err != nil {
			return "", err
		}
		if !check.Verified() {
			return "", fmt.Errorf("chunk at %d does not verify", offset)
		}
		offset += chunk.ChunkSize
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.NewSectionReader(file, 0, entry.Size)); err != nil {
		return "", err
	}
	if got := fmt.Sprintf("sha256:%x", hash.Sum(nil)); got != entry.Digest {
		return "", fmt.Errorf("content has digest %s, the table of contents says %s", got, entry.Digest)
	}
	return entry.Digest, nil
}
