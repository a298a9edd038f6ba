// Package demo moves a disk over a slow link and uses it meanwhile, to show
// what a migration is like for the one who uses the disk. Every claim that it
// makes it also checks.
package demo

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

const (
	// DefaultSize is the size of the disk in bytes.
	DefaultSize = 256 << 20
	// MinSize is the smallest disk that shows anything, in bytes.
	MinSize = 32 << 20

	// duration is about how long the move lasts if no rate is asked for.
	duration = 15 * time.Second
	// delay is how long the link takes one way.
	delay = 2 * time.Millisecond
)

// Options of a demo.
type Options struct {
	Size int64        // of the disk in bytes; 0 is DefaultSize
	Rate int64        // of the link in bytes per second; 0 makes the move last some 15 s
	Keep string       // directory in which the disks are left; empty: a temporary one, removed
	Out  io.Writer    // where to tell what happens
	Log  *slog.Logger // what the parts log; nil for nothing
}

// Run shows a migration. It returns an error if anything did not hold, or
// could not be shown.
func Run(ctx context.Context, o Options) (err error) {
	if o.Size == 0 {
		o.Size = DefaultSize
	}
	if o.Size < MinSize {
		return fmt.Errorf("a disk of %s shows nothing: want at least %s", units.Format(o.Size), units.Format(MinSize))
	}
	dir, err := workDir(o.Keep)
	if err != nil {
		return err
	}
	if o.Keep == "" {
		defer func() {
			if e := os.RemoveAll(dir); e != nil && err == nil {
				err = e
			}
		}()
	}
	s := &stage{Options: o, dir: dir, started: time.Now()}
	s.printf("silo-nbd demo: a disk of %s moves over a slow link and is used meanwhile\n\n", units.Human(o.Size))
	if err := s.prepare(ctx); err != nil {
		return err
	}
	if err := s.run(ctx); err != nil {
		return err
	}
	return s.judge()
}

// workDir makes a directory of the demo's own. Two demos never meet in one,
// and no file that exists is touched.
func workDir(keep string) (string, error) {
	if keep == "" {
		return os.MkdirTemp("", "silo-nbd-demo-")
	}
	if err := os.MkdirAll(keep, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{sourceFile, destFile} {
		if _, err := os.Lstat(filepath.Join(keep, name)); err == nil {
			return "", fmt.Errorf("%s exists already: choose another directory for --keep", filepath.Join(keep, name))
		}
	}
	return filepath.Abs(keep)
}

const (
	sourceFile = "source.raw"
	destFile   = "dest.raw"
	diskName   = "demo"
)

// stage is one run of the demo.
type stage struct {
	Options
	dir     string
	started time.Time // of the destination, later

	source *sources.File
	data   int64  // bytes of the source's disk that are not holes
	holes  []bool // by block
	want   *overlay
	result result
}

func (s *stage) printf(format string, args ...any) {
	fmt.Fprintf(s.Out, format, args...) // a reader that has gone is no reason to stop: the exit code counts too
}

// event tells what happened, with the time since the destination was started.
func (s *stage) event(format string, args ...any) {
	s.printf("  %6.2f s  %s\n", time.Since(s.started).Seconds(), fmt.Sprintf(format, args...))
}

// prepare makes the disk and chooses the rate.
func (s *stage) prepare(ctx context.Context) error {
	path := filepath.Join(s.dir, sourceFile)
	s.printf("  making a disk of real files, which takes some seconds\n")
	c, err := makeDisk(ctx, path, s.Size)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	s.data = s.Size
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.data = min(s.Size, st.Blocks*512)
	}
	if s.Rate == 0 {
		s.Rate = max(1<<20, int64(float64(s.data)/duration.Seconds()))
	}
	s.source, err = sources.OpenFile(path, sources.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	s.holes = holesOf(s.source, s.Size)
	s.want = newOverlay(s.source)
	s.printf("  disk   %s, %s in all\n", c, units.Human(s.data))
	s.printf("  link   TCP on this machine, held to %s/s and %s round trip\n", units.Human(s.Rate), 2*delay)
	s.printf("         so a copy would take %s before anybody could use it, and one block of %s takes %s\n\n",
		short(s.copyTime()), units.Human(blockSize), short(s.blockTime()))
	return nil
}

// blockTime is how long the link needs for one block that is asked for.
func (s *stage) blockTime() time.Duration {
	return 2*delay + time.Duration(float64(blockSize)/float64(s.Rate)*float64(time.Second))
}

// copyTime is how long the link needs for all the data.
func (s *stage) copyTime() time.Duration {
	return time.Duration(float64(s.data) / float64(s.Rate) * float64(time.Second))
}
