package disks

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// bind ties a disk to its map, once it is known to be the right one. With moved an
// operator says that it is, whatever its name and times say.
func (d *Disk) bind(s Spec, moved bool) error {
	is, err := readMark(d.File)
	if err != nil {
		return err
	}
	wrong, err := d.wrong(is)
	if err != nil {
		return err
	}
	vouched := moved && wrong != "" && d.Map.State() != lazy.MapComplete
	if wrong == "" || moved {
		if wrong, err = d.differs(moved); err != nil {
			return err
		}
	}
	if wrong != "" {
		return d.refuse(wrong, moved)
	}
	if err := d.ours(s); err != nil {
		return err
	}
	if vouched {
		if err := d.Map.SetCompare(true); err != nil {
			return err
		}
	}
	return d.Map.Bind(&backing{file: d.File, device: d.Map.Identity().Device, where: d.Map.Path()}, is.value())
}

// differs says why the contents of a disk cannot be those of its map; empty: nothing
// does. Once it is complete others may have written it, and an operator who vouches for
// a disk may know of a write: then only one is refused of which nothing is as it was.
func (d *Disk) differs(moved bool) (string, error) {
	k, complete := d.Map.Binding(), d.Map.State() == lazy.MapComplete
	if complete && !k.Clean {
		return "", nil // it has been written ever since
	}
	differ, of, err := k.Witness(d.File, d.Map.Identity())
	if err != nil || differ == 0 || differ < of && (complete || moved) {
		return "", err
	}
	return fmt.Sprintf("%d of %d blocks that its map remembers are not what they were", differ, of), nil
}

// refuse says that a disk is not the one of its map, and the ways out.
func (d *Disk) refuse(wrong string, moved bool) error {
	way := "bring the right one back"
	if d.IsBlockDevice() {
		way = "give the right device, best by its name in /dev/disk/by-id"
	}
	if !moved {
		way += ", or, if this is the right one and was only moved or copied as it was, add --disk-moved"
	}
	return fmt.Errorf("%s is not the disk of its map %s, or not as dest has left it: %s; nothing was changed: %s, or begin anew with --overwrite",
		d.Path(), d.Map.Path(), wrong, way)
}

// wrong says why a disk that bears is cannot be the one of its map, from what can be
// seen without reading it; empty: nothing does.
func (d *Disk) wrong(is *mark) (string, error) {
	k := d.Map.Binding()
	device := d.Map.Identity().Device.String()
	if is != nil && is.Device != device {
		return fmt.Sprintf("it bears the mark of the map %s of device %s, and this map is of device %s", is.Map, is.Device, device), nil
	}
	if len(k.Stamp) == 0 { // of a version that did not bind it
		return "", nil
	}
	var was sources.Stamp
	if err := json.Unmarshal(k.Stamp, &was); err != nil {
		return "", fmt.Errorf("%s: its stamp cannot be read: %w: %w", d.Map.Path(), err, lazy.ErrMapDamaged)
	}
	now, err := d.Stamp()
	if err != nil {
		return "", err
	}
	if same, known := was.SameDisk(now); known && !same {
		return "it is another one: " + difference(was, now, false), nil
	}
	if !k.Bears(is.value()) {
		if is == nil {
			return "it bears no mark of dest, so it is another file or an older state", nil
		}
		return fmt.Sprintf("it bears the mark %s and its map says %s: one of them is an older state", is.value(), k.Mark), nil
	}
	if !k.Clean || d.Map.State() == lazy.MapComplete || unchanged(was, now) {
		return "", nil
	}
	return "it was changed since dest ended: " + difference(was, now, true), nil
}

// unchanged reports whether nothing speaks against a disk being as it was. A device
// proves nothing over a restart of the host: then its samples do.
func unchanged(was, now sources.Stamp) bool {
	if was.Block {
		if was.ChangeTime != 0 && now.ChangeTime != 0 && was.ChangeTime != now.ChangeTime {
			return false // the file behind it
		}
		return was.BootID == "" || was.BootID != now.BootID || was.DiskSeq != now.DiskSeq || was.Unchanged(now)
	}
	// The file system may have another number now, and some number their inodes anew.
	now.Dev = was.Dev
	if was.Fickle && now.Fickle {
		now.Inode = was.Inode
	}
	return was.Unchanged(now)
}

// difference lists in what two stamps differ, with written also in what tells of writes.
func difference(was, now sources.Stamp, written bool) string {
	var all []string
	add := func(what string, was, now any) {
		if was != now {
			all = append(all, fmt.Sprintf("%s %v, and it was %v", what, now, was))
		}
	}
	add("size", was.Size, now.Size)
	add("a block device", was.Block, now.Block)
	if !was.Block {
		add("inode", was.Inode, now.Inode)
		add("made", stampTime(was.Birth), stampTime(now.Birth))
	}
	add("WWID", quoted(was.WWID), quoted(now.WWID))
	add("device mapper's UUID", quoted(was.DMUUID), quoted(now.DMUUID))
	add("partition's UUID", quoted(was.PartUUID), quoted(now.PartUUID))
	if written {
		add("modified", stampTime(was.ModTime), stampTime(now.ModTime))
		add("changed", stampTime(was.ChangeTime), stampTime(now.ChangeTime))
		add("sectors written", was.Written, now.Written)
	}
	return strings.Join(all, "; ")
}

func quoted(s string) string { return fmt.Sprintf("%q", s) }

func stampTime(ns int64) string {
	if ns == 0 {
		return "at an unknown time"
	}
	return time.Unix(0, ns).UTC().Format("2006-01-02T15:04:05.999999999Z")
}
