// Prints the entries of the archives that are named as arguments, one a line, as Go's archive/tar sees them.
package main

import (
	"archive/tar"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sort"
	"strings"
)

func hexed(text string) string {
	if text == "" {
		return "-"
	}
	return hex.EncodeToString([]byte(text))
}

var kinds = map[byte]string{
	tar.TypeReg: "Regular", tar.TypeCont: "Regular", tar.TypeGNUSparse: "Regular", tar.TypeLink: "HardLink",
	tar.TypeSymlink: "Symlink", tar.TypeChar: "CharDevice", tar.TypeBlock: "BlockDevice",
	tar.TypeDir: "Directory", tar.TypeFifo: "Fifo",
}

func view(place int, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	archive := tar.NewReader(file)
	for {
		entry, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if entry.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		kind, known := kinds[entry.Typeflag]
		if !known {
			return fmt.Errorf("type %c", entry.Typeflag)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			return err
		}
		crc := uint32(0)
		size := int64(0)
		if kind == "Regular" {
			crc = crc32.ChecksumIEEE(content)
			size = entry.Size
		}
		link := ""
		if kind == "HardLink" || kind == "Symlink" {
			link = entry.Linkname
		}
		major, minor := int64(0), int64(0)
		if strings.HasSuffix(kind, "Device") {
			major, minor = entry.Devmajor, entry.Devminor
		}
		xattrs := []string{}
		for name, value := range entry.PAXRecords {
			if strings.HasPrefix(name, "SCHILY.xattr.") {
				xattrs = append(xattrs, hexed(strings.TrimPrefix(name, "SCHILY.xattr."))+"="+hexed(value))
			}
		}
		sort.Strings(xattrs)
		all := strings.Join(xattrs, ",")
		if all == "" {
			all = "-"
		}
		fmt.Println(place, kind, hexed(strings.TrimRight(entry.Name, "/")), hexed(link), size,
			fmt.Sprintf("%o", entry.Mode&07777), entry.Uid, entry.Gid, hexed(entry.Uname), hexed(entry.Gname),
			fmt.Sprintf("%d.%09d", entry.ModTime.Unix(), entry.ModTime.Nanosecond()), major, minor, crc, all)
	}
}

func main() {
	for place, path := range os.Args[1:] {
		if err := view(place, path); err != nil {
			fmt.Println(place, "error")
			fmt.Fprintln(os.Stderr, path, err)
		}
	}
}
