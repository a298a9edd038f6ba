// Package inspect says in words, or in JSON, what the map of a disk knows.
package inspect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
)

// maxRuns is how many missing runs are listed in words; JSON has all.
const maxRuns = 20

// Run is a stretch of a disk, in bytes.
type Run struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// Report is what is known of a disk. Sizes are in bytes, the others in blocks.
type Report struct {
	Disk       string `json:"disk"`
	Map        string `json:"map"`
	State      string `json:"state"` // standby, live or complete
	InUse      bool   `json:"in_use"`
	Safe       bool   `json:"safe"` // the disk is whole and can be used without silo-nbd
	Size       int64  `json:"size"`
	BlockSize  int64  `json:"block_size"`
	Name       string `json:"name"` // the source's
	Device     string `json:"device"`
	Source     string `json:"source"`
	Generation uint64 `json:"generation"`
	Fetched    int64  `json:"fetched"`
	Written    int64  `json:"written"`
	Partial    int64  `json:"partial"`
	Missing    int64  `json:"missing"`
	Logged     int64  `json:"logged"` // bytes
	Runs       []Run  `json:"missing_runs"`
	Problem    string `json:"problem,omitempty"` // why the disk cannot be the one of the map
	HandedOff  *Owner `json:"handed_off,omitempty"`
}

// Of reads the map at path, of disk, and changes nothing.
func Of(disk, path string) (*Report, error) {
	i, err := lazy.Inspect(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: dest keeps no map there: is %s a disk that dest has received, and is its map elsewhere (--map)?", err, disk)
	case err != nil:
		return nil, err
	}
	r := &Report{
		Disk: disk, Map: path, State: i.State.String(), InUse: i.InUse,
		Size: i.Identity.Size, BlockSize: i.Identity.BlockSize, Name: i.Identity.Name,
		Device: i.Identity.Device.String(), Source: i.Identity.Source.String(), Generation: i.Identity.Generation,
		Fetched: i.Fetched, Written: i.Written, Partial: i.Partial, Missing: i.Missing, Logged: i.Logged,
		Runs: []Run{}, Problem: unfit(disk, i.Identity.Size),
	}
	if r.Problem == "" {
		r.Problem = disks.Doubt(disk, i)
	}
	r.Safe = i.State == lazy.MapComplete && !i.InUse && r.Problem == ""
	i.EachMissing(func(off, length int64) bool {
		r.Runs = append(r.Runs, Run{off, length})
		return true
	})
	return r, nil
}

// unfit says why disk cannot be the one of a map of size bytes; empty if it can.
func unfit(disk string, size int64) string {
	f, err := os.OpenFile(disk, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO is no reason to hang
	if err != nil {
		return err.Error()
	}
	defer f.Close() // only read
	info, err := f.Stat()
	if err != nil {
		return err.Error()
	}
	have, err := f.Seek(0, io.SeekEnd)
	switch {
	case err != nil:
		return err.Error()
	case have < size, have > size && info.Mode().IsRegular():
		return fmt.Sprintf("%s has %d bytes, and its map is of a disk of %d", disk, have, size)
	}
	return ""
}

// WriteJSON writes the report as JSON.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// WriteText writes the report in words.
func (r *Report) WriteText(w io.Writer) error {
	p := printer{w: w}
	if r.State == stateHandedOff {
		p.line("%s: no map: dest has not received it", r.Disk)
		p.line("not safe: it was handed off: %s", r.HandedOff.text)
		return p.err
	}
	p.line("%s: %s, blocks of %s, called %q by its source", r.Disk, units.Human(r.Size), units.Human(r.BlockSize), r.Name)
	p.line("state: %s", r.State)
	p.line("source: %s, generation %d", r.Source, r.Generation)
	p.line("blocks: %d fetched, %d written here, %d missing (%d of them partly written)", r.Fetched, r.Written, r.Missing, r.Partial)
	if r.Logged > 0 {
		p.line("log: %d bytes of flushed writes that the disk may not have yet: dest lays them over it when it starts", r.Logged)
	}
	for i, run := range r.Runs {
		if i == maxRuns {
			p.line("  and %d more runs: --json lists all", len(r.Runs)-maxRuns)
			break
		}
		p.line("  missing: %d bytes at %d", run.Length, run.Offset)
	}
	switch {
	case r.HandedOff != nil:
		p.line("not safe: it was handed off: %s", r.HandedOff.text)
	case r.Problem != "":
		p.line("not safe: %s", r.Problem)
	case r.InUse:
		p.line("in use: a dest has this disk now; the numbers are those of its last save")
	case r.Safe:
		p.line("safe: the disk is complete and can be used without silo-nbd; the map may be removed")
	default:
		p.line("not safe: the disk is not whole; run dest with it again to go on")
	}
	return p.err
}

type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}
