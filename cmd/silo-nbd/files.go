package main

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// openFrozen opens disks that are sent as they are.
func (f *sourceFlags) openFrozen(specs []disks.Spec, c *console) ([]*sources.File, error) {
	open := func() ([]*sources.File, error) { return disks.OpenSource(specs, false) }
	if f.shared {
		open = func() ([]*sources.File, error) { return disks.OpenShared(specs) }
	}
	files, err := open()
	if err != nil && !f.shared && errors.Is(err, syscall.EBUSY) {
		return nil, fmt.Errorf("%w; --shared sends it all the same, if it is surely not written meanwhile", err)
	}
	warnOf(files, c)
	warnOfFormat(files, c)
	return files, err
}

// warnOf logs what was found when disks were opened.
func warnOf(files []*sources.File, c *console) {
	for _, f := range files {
		for _, w := range f.Warnings() {
			c.log.Warn(w)
		}
	}
}

// warnOfFormat logs which of the disks seem to be images of another format.
func warnOfFormat(files []*sources.File, c *console) {
	for _, f := range files {
		format, err := f.Format()
		if err != nil || format == "" {
			continue // what cannot be read shows itself soon enough
		}
		c.log.Warn("this is an image of another format and not a disk: it is taken byte by byte, and not as the disk that it holds; "+
			"convert it to raw with qemu-img, or unpack it, or export it with qemu-nbd and take the device of silo-nbd attach",
			"disk", f.Path(), "format", format)
	}
}
