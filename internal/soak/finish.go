package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// finish ends the destination of a complete migration, in one of the ways in which
// it may end, and looks at what is left: plain disks.
func (m *migration) finish(ctx context.Context) error {
	if m.fioDisk != nil {
		if err := m.fioDisk.last(ctx, m); err != nil {
			return err
		}
	}
	way := m.r.IntN(3)
	if way == 0 { // under load
		if err := m.lose(); err != nil {
			return err
		}
		return m.look(ctx)
	}
	if err := m.clients.finish(); err != nil {
		return err
	}
	if err := m.clients.settle(); err != nil {
		return err
	}
	m.clients.close()
	m.clients = nil
	if way == 1 {
		m.dest.kill()
		m.sum.DestKills.Add(1)
		return m.look(ctx)
	}
	code, err := m.dest.terminate() // with --exit-when-complete it may end just before
	if err == nil && code != 0 {
		err = fmt.Errorf("dest ended with exit code %d after all was complete", code)
	}
	return errors.Join(err, m.look(ctx))
}

// look holds the disks that are left against what they have to be.
func (m *migration) look(ctx context.Context) error {
	for _, d := range m.disks() {
		if sum, err := sumOf(d.base); err != nil || sum != d.sum {
			return fmt.Errorf("the source's disk %s has changed (%v)", d.src, err)
		}
		if err := m.inspect(ctx, d); err != nil {
			return err
		}
	}
	if err := m.disk.compare(); err != nil {
		return &mismatch{fmt.Errorf("%s: %w", m.disk.dst, err)}
	}
	m.sum.counts.checked.Add(m.disk.size)
	if m.fioDisk != nil {
		if err := m.fioDisk.compareRest(); err != nil {
			return &mismatch{err}
		}
	}
	if m.disk.model.exact() {
		return m.verify(ctx)
	}
	return nil
}

// inspect asks the command what it thinks of a disk.
func (m *migration) inspect(ctx context.Context, d *disk) error {
	out, err := exec.CommandContext(ctx, m.o.Bin, "inspect", "--json", d.dst).Output()
	if err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	var report struct {
		State   string
		Safe    bool
		Missing int64
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	if report.State != "complete" || !report.Safe || report.Missing != 0 {
		return fmt.Errorf("inspect says of a complete disk: %s", out)
	}
	return nil
}

// compare holds every sector of the destination's file against what it may be.
func (d *disk) compare() error {
	f, err := os.Open(d.dst)
	if err != nil {
		return err
	}
	defer f.Close() // only read
	return d.each(f, func(p []byte, off int64) error {
		lo, hi := span(off, int64(len(p)))
		return d.model.compare(lo, hi, p, false)
	})
}

// each calls do for all of a file of the disk's size, piece by piece.
func (d *disk) each(f *os.File, do func(p []byte, off int64) error) error {
	if info, err := f.Stat(); err != nil || info.Size() != d.size {
		return fmt.Errorf("%s is not of %d bytes (%v)", f.Name(), d.size, err)
	}
	p := make([]byte, mib)
	for off := int64(0); off < d.size; off += int64(len(p)) {
		piece := p[:min(int64(len(p)), d.size-off)]
		if _, err := f.ReadAt(piece, off); err != nil {
			return err
		}
		if err := do(piece, off); err != nil {
			return err
		}
	}
	return nil
}

// verify lets the command compare the destination's disk with one that is what
// it has to be.
func (m *migration) verify(ctx context.Context) error {
	d := m.disk
	path := filepath.Join(m.dir, d.name+".expected")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	err = d.each(d.base, func(p []byte, off int64) error {
		d.model.apply(p, off)
		_, err := f.WriteAt(p, off)
		return err
	})
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, m.o.Bin, "verify", path, d.dst).CombinedOutput(); err != nil {
		return &mismatch{fmt.Errorf("verify: %w: %s", err, out)}
	}
	return nil
}

func sumOf(f *os.File) (uint32, error) {
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	_, err := io.Copy(sum, io.NewSectionReader(f, 0, 1<<62))
	return sum.Sum32(), err
}
