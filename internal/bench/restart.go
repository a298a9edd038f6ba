package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// partlyWritten is of how many missing blocks a sector was written before the restart.
const partlyWritten = 4096

// restartRows starts dest on a disk of which every other block is here, without its source: the map has all its pages.
func restartRows(ctx context.Context, b *bench, size int64) error {
	dst := filepath.Join(b.disk, "restart.raw")
	defer os.Remove(dst)
	defer os.Remove(dst + disks.MapSuffix)
	if err := halfADisk(dst, size); err != nil {
		return err
	}
	var ready, first, early []float64
	for range b.rounds {
		s, err := restartOnce(ctx, b, dst)
		if err != nil {
			return err
		}
		ready = append(ready, float64(s.ready)/float64(time.Millisecond))
		first = append(first, float64(s.first)/float64(time.Millisecond))
		early = append(early, float64(s.early)/mib)
	}
	fmt.Printf("   dest again, %d GiB, every other block here, %d more partly, no source (a block that is here is read)\n", size/gib, partlyWritten)
	fmt.Printf("   %6d GiB %12.1f %16.1f %18.1f %18s\n", size/gib, median(ready), median(first), median(early), "-")
	return nil
}

// halfADisk makes a sparse disk and its map as a migration leaves them that was killed half-way.
func halfADisk(path string, size int64) (err error) {
	const block = 64 * kib
	f, err := sources.OpenFile(path, sources.FileOptions{Create: true, Size: size})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	m, err := lazy.CreateMap(path+disks.MapSuffix, lazy.Identity{
		Size: size, BlockSize: block, Source: lazy.UUID{1}, Generation: 1, Name: "disk",
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	dev, err := lazy.New(f, lazy.Options{Map: m, KnownZero: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	stream := dev.Attach(nobody{})
	for off := int64(0); off < size; off += 2 * block {
		if err := stream.ZeroAt(off, min(block, size-off), true); err != nil {
			return err
		}
	}
	blocks := size / block
	for i := range int64(partlyWritten) {
		if _, err := dev.WriteAt(make([]byte, 512), (blocks/partlyWritten*i|1)*block+512); err != nil {
			return err
		}
	}
	return nil
}

// nobody is a source that is asked for nothing.
type nobody struct{}

func (nobody) NeedAt(int64, int64)     {}
func (nobody) DontNeedAt(int64, int64) {}

func restartOnce(ctx context.Context, b *bench, dst string) (s started, err error) {
	began := time.Now()
	dest, err := startChild(ctx, b.silo, "dest", "--disk", dst, "--connect", "unix://"+filepath.Join(b.memory, "nobody.sock"),
		"--nbd", "unix://"+filepath.Join(b.memory, "nbd.sock"))
	if err != nil {
		return s, err
	}
	defer dest.stop()
	uri, err := dest.ready("ready disk ")
	if err != nil {
		return s, err
	}
	s.ready = time.Since(began)
	client, err := nbdclient.Dial(ctx, uri)
	if err != nil {
		return s, err
	}
	defer client.Close()
	if _, err := client.ReadAt(make([]byte, 4*kib), 0); err != nil {
		return s, err
	}
	s.first = time.Since(began)
	s.early, err = dest.peakMemory()
	return s, err
}
