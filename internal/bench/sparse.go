package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// orderPart moves disks that are nearly all holes: what is left is what each block costs the source to put in order
// and both to account for.
func orderPart(ctx context.Context, b *bench) error {
	sizes := []int64{1 * gib, 16 * gib, 256 * gib}
	if b.quick {
		sizes = []int64{1 * gib, 2 * gib}
	}
	fmt.Printf("   sparse disks, blocks of 64 KiB\n")
	fmt.Printf("   %-10s %12s %12s %18s %18s\n", "", "blocks", "s", "CPU ns/block src", "CPU ns/block dst")
	for _, size := range sizes {
		var took, source, dest []float64
		for range b.rounds {
			t, s, d, err := moveSparse(ctx, b, size)
			if err != nil {
				return err
			}
			blocks := float64(size / (64 * kib))
			took = append(took, t.Seconds())
			source = append(source, float64(s.Nanoseconds())/blocks)
			dest = append(dest, float64(d.Nanoseconds())/blocks)
		}
		fmt.Printf("   %6d GiB %12d %12.3f %18.0f %18.0f\n", size/gib, size/(64*kib), median(took), median(source), median(dest))
	}
	fmt.Println("   (the CPU time of starting a process, some 10 ms, is in it: it shows in the smallest)")
	return nil
}

func moveSparse(ctx context.Context, b *bench, size int64) (took, source, dest time.Duration, err error) {
	src, dst := filepath.Join(b.disk, "sparse.raw"), filepath.Join(b.disk, "copy.raw")
	if err := sparseFile(src, size); err != nil {
		return 0, 0, 0, err
	}
	defer os.Remove(src)
	defer os.Remove(dst)
	m, err := b.migrate(ctx, setup{
		src: src, dst: dst, listen: "unix://" + filepath.Join(b.memory, "wire.sock"), destArgs: []string{"--exit-when-complete"},
	})
	if err != nil {
		return 0, 0, 0, err
	}
	return m.finish()
}

// startupPart starts dest for a small and a large disk, reads a first block that is missing, and looks at its memory.
func startupPart(ctx context.Context, b *bench) error {
	sizes := []int64{1 * gib, 1024 * gib}
	fmt.Printf("   sparse disks with data in the last block, which is read first\n")
	fmt.Printf("   %-10s %12s %16s %18s %18s\n", "", "ready, ms", "first byte, ms", "memory then, MiB", "at the end, MiB")
	for _, size := range sizes {
		var ready, first, early, late []float64
		for range b.rounds {
			s, err := startOnce(ctx, b, size)
			if err != nil {
				return err
			}
			ready = append(ready, float64(s.ready)/float64(time.Millisecond))
			first = append(first, float64(s.first)/float64(time.Millisecond))
			early = append(early, float64(s.early)/mib)
			late = append(late, float64(s.late)/mib)
		}
		fmt.Printf("   %6d GiB %12.1f %16.1f %18.1f %18.1f\n", size/gib, median(ready), median(first), median(early), median(late))
	}
	size := int64(1024 * gib)
	if b.quick {
		size = gib
	}
	return restartRows(ctx, b, size)
}

// started is what one start of dest showed.
type started struct {
	ready, first time.Duration // since the start of dest
	early, late  int64         // most memory of dest until the first read, and until all was complete
}

func startOnce(ctx context.Context, b *bench, size int64) (s started, err error) {
	src, dst := filepath.Join(b.disk, "sparse.raw"), filepath.Join(b.disk, "copy.raw")
	if err := sparseFile(src, size); err != nil {
		return s, err
	}
	defer os.Remove(src)
	defer os.Remove(dst)
	m, err := b.migrate(ctx, setup{src: src, dst: dst, listen: "unix://" + filepath.Join(b.memory, "wire.sock")})
	if err != nil {
		return s, err
	}
	defer m.stop()
	s.ready = time.Since(m.began)
	client, err := nbdclient.Dial(ctx, m.uri)
	if err != nil {
		return s, err
	}
	defer client.Close()
	buf := make([]byte, 4*kib)
	if _, err := client.ReadAt(buf, size-int64(len(buf))); err != nil {
		return s, err
	}
	s.first = time.Since(m.began)
	if string(buf[:8]) != "silo-nbd" {
		return s, fmt.Errorf("the last block of %d GiB does not hold what was written there", size/gib)
	}
	if s.early, err = m.dest.peakMemory(); err != nil {
		return s, err
	}
	if _, err := m.source.wait(); err != nil {
		return s, err
	}
	s.late, err = m.dest.peakMemory()
	return s, err
}
