package identity

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/migrate"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// away makes a disk that was handed off and not yet sent, and ends its source.
func away(t *testing.T, path string, o Options) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	opened(t, path, "", func(d Spec) { move(t, []Spec{d}, o) })
}

// plainCopy copies the contents of a file.
func plainCopy(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(to, b, 0o600))
}

// poke writes into a disk and puts its modification time back.
func poke(t *testing.T, path string, off int64) {
	t.Helper()
	before, err := os.Stat(path)
	require.NoError(t, err)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("poked"), off)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, os.Chtimes(path, before.ModTime(), before.ModTime()))
}

// What has not been fetched cannot be compared, so a disk of which it is proved that it
// was written is not sent on, by the same command neither, also when the times were
// put back since; only beginning anew helps (faults F1, F7; trap I7).
func TestDiskThatWasWrittenAfterItsHandoffIsNotSentOn(t *testing.T) {
	for _, o := range []Options{{}, {Live: true}} {
		for _, seen := range []bool{true, false} {
			vm := filepath.Join(t.TempDir(), "vm.raw")
			away(t, vm, o)
			before, err := os.Stat(vm)
			require.NoError(t, err)
			opened(t, vm, "", func(d Spec) {
				l := mustOpen(t, []Spec{d}, o)
				if seen {
					touch(t, d)
					require.ErrorContains(t, l.Changed(0), "was written while it was sent: its modification time is another")
				}
				require.NoError(t, l.disks.unlock()) // killed
			})
			touch(t, Spec{Disk: openFile(t, vm, false)})
			for range 2 {
				opened(t, vm, "", func(d Spec) {
					refuses(t, []Spec{d}, o, "was written here after it was handed off")
					require.NoError(t, os.Chtimes(vm, before.ModTime(), before.ModTime()))
				})
			}
			served(t, vm, "", Options{Reclaim: true, Live: o.Live})
			served(t, vm, "", o)
		}
	}
}

// The operator may say that it was only touched. Then it is another generation, which the
// destination compares; samples of the contents speak against it.
func TestOperatorVouchesForATouchedDisk(t *testing.T) {
	vm := filepath.Join(t.TempDir(), "vm.raw")
	away(t, vm, Options{})
	now := openFile(t, vm, false)
	info, err := os.Stat(vm)
	require.NoError(t, err)
	later := info.ModTime().Add(1e9)
	require.NoError(t, os.Chtimes(vm, later, later))
	_ = now.Close()
	opened(t, vm, "", func(d Spec) {
		refuses(t, []Spec{d}, Options{}, "--disk-moved")
		l := mustOpen(t, []Spec{d}, Options{Moved: true})
		require.True(t, l.HandedOff())
		require.NoError(t, l.Close())
		require.NoError(t, mustOpen(t, []Spec{d}, Options{}).Close(), "it was believed")
	})
	touch(t, Spec{Disk: openFile(t, vm, false)}) // the first bytes: a sample
	opened(t, vm, "", func(d Spec) {
		refuses(t, []Spec{d}, Options{Moved: true}, "what is at 0 differs")
	})
}

// Another file by the name of a disk that was handed off, such as a sibling of the same
// template or an older backup, is not that disk (fault F1).
func TestAnotherFileByTheNameIsNotTheRestOfTheDisk(t *testing.T) {
	for _, o := range []Options{{}, {Live: true}} {
		vm := filepath.Join(t.TempDir(), "vm.raw")
		away(t, vm, o)
		require.NoError(t, os.Rename(vm, vm+".real"))
		plainCopy(t, vm+".real", vm)
		info, err := os.Stat(vm + ".real")
		require.NoError(t, err)
		require.NoError(t, os.Chtimes(vm, info.ModTime(), info.ModTime()))
		opened(t, vm, "", func(d Spec) {
			refuses(t, []Spec{d}, o, "does not bear the mark")
			l := mustOpen(t, []Spec{d}, Options{Live: o.Live, Moved: true})
			require.True(t, l.HandedOff())
			require.NoError(t, l.Close())
		})
	}
	vm := filepath.Join(t.TempDir(), "vm.raw")
	away(t, vm, Options{})
	require.NoError(t, os.Rename(vm, vm+".real"))
	plainCopy(t, vm+".real", vm)
	opened(t, vm, "", func(d Spec) { refuses(t, []Spec{d}, Options{}, "does not bear the mark") })
	require.NoError(t, os.Rename(vm+".real", vm))
	opened(t, vm, "", func(d Spec) {
		l := mustOpen(t, []Spec{d}, Options{}) // the right one is back: nothing was noted
		require.True(t, l.HandedOff())
		require.NoError(t, l.Close())
	})
}

// A change time that moves alone, by a link, another mode or a label, is no write: the
// move goes on with one warning, and the next source has another generation, which the
// destination compares (fault F7).
func TestChangeTimeAloneIsNoWrite(t *testing.T) {
	for _, o := range []Options{{}, {Live: true}} {
		vm := filepath.Join(t.TempDir(), "vm.raw")
		require.NoError(t, os.WriteFile(vm, make([]byte, 1<<20), 0o600))
		opened(t, vm, "", func(d Spec) {
			warned := 0
			o.Doubt = func(disk string) { warned++ }
			l := mustOpen(t, []Spec{d}, o)
			handOff(t, l, []Spec{d})
			first := l.Identity(0)
			require.NoError(t, os.Link(vm, vm+".link"))
			require.NoError(t, l.Changed(0))
			require.NoError(t, os.Chmod(vm, 0o640))
			require.NoError(t, l.Changed(0))
			require.Equal(t, 1, warned)
			require.NoError(t, l.Taken()) // of the next connection
			require.NoError(t, l.Close())

			l = mustOpen(t, []Spec{d}, o)
			require.NotEqual(t, first, l.Identity(0), "it is not proved")
			require.Equal(t, first.UUID, l.Identity(0).UUID)
			require.NoError(t, l.Changed(0))
			require.NoError(t, l.Complete())
			require.NoError(t, l.Close())
			l = mustOpen(t, []Spec{d}, o)
			require.True(t, l.Finished())
			require.NoError(t, l.Close())
		})
	}
}

// A write whose modification time was put back looks like a change of the change time
// alone: samples of the contents tell, while it is sent and at the next start (fault F5).
func TestSamplesTellAWriteWhoseTimeWasPutBack(t *testing.T) {
	for _, o := range []Options{{}, {Live: true}} {
		for _, off := range []int64{0, 1<<20 - sampleSize, 1<<20 - 8} {
			vm := filepath.Join(t.TempDir(), "vm.raw")
			away(t, vm, o)
			opened(t, vm, "", func(d Spec) {
				l := mustOpen(t, []Spec{d}, o)
				require.NoError(t, os.Chmod(vm, 0o640))
				require.NoError(t, l.Changed(0))
				poke(t, vm, off)
				require.ErrorContains(t, l.Changed(0), "differs from what was there")
				require.NoError(t, l.Close())
				refuses(t, []Spec{d}, o, "differs from what was there")
			})
		}
		vm := filepath.Join(t.TempDir(), "vm.raw")
		away(t, vm, o)
		poke(t, vm, 0)
		opened(t, vm, "", func(d Spec) { refuses(t, []Spec{d}, o, "what is at 0 differs") })
	}
}

// What proves a write of a device: another count within one boot. Over a restart of the
// host nothing is proved, and the ends compare (fault F7).
func TestCountOfADeviceProvesAWriteWithinABoot(t *testing.T) {
	was := sources.Stamp{Size: 1 << 20, Block: true, Dev: 7, WWID: "w", DiskSeq: 3, Written: 10, BootID: "b"}
	now := was
	require.Empty(t, written(was, now))
	now.Written = 18
	require.Contains(t, written(was, now), "sectors written")
	now.BootID, now.DiskSeq = "c", 1
	require.Empty(t, written(was, now))
	now.Size = 2 << 20
	require.Contains(t, written(was, now), "bytes")
}

// lacking is a disk on a file system that cannot keep a mark.
type lacking struct{ Disk }

func (lacking) Xattr(string) ([]byte, error)  { return nil, unix.ENOTSUP }
func (lacking) SetXattr(string, []byte) error { return unix.ENOTSUP }
func (lacking) RemoveXattr(string) error      { return unix.ENOTSUP }

// Without attributes the copy that has the times and the size of the disk is compared.
func TestCopyWithoutAttributesIsCompared(t *testing.T) {
	vm := filepath.Join(t.TempDir(), "vm.raw")
	require.NoError(t, os.WriteFile(vm, bytes.Repeat([]byte("v"), 1<<20), 0o600))
	opened(t, vm, "", func(d Spec) { move(t, []Spec{{Disk: lacking{d.Disk}, Name: d.Name}}, Options{}) })
	info, err := os.Stat(vm)
	require.NoError(t, err)
	require.NoError(t, os.Rename(vm, vm+".real"))
	copyAll(t, vm+".real", vm)
	require.NoError(t, os.Chtimes(vm, info.ModTime(), info.ModTime()))
	opened(t, vm, "", func(d Spec) {
		disks := []Spec{{Disk: lacking{d.Disk}, Name: d.Name}}
		l := mustOpen(t, disks, Options{})
		require.True(t, l.HandedOff())
		require.NoError(t, l.Close())
	})
}

// A copy of a golden image has a part of it: an image that was written since is another one,
// and no comparison of that part makes it the same; one that was only touched otherwise is
// compared (fault F7).
func TestGoldenImageThatWasWrittenIsAnother(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image.raw")
	require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	identify := func(o Options) (id migrate.Identity) {
		opened(t, image, "", func(d Spec) {
			l := mustOpen(t, []Spec{d}, o)
			id = l.Identity(0)
			require.NoError(t, l.Close())
		})
		return id
	}
	first := identify(Options{Clone: true})
	require.Equal(t, first, identify(Options{Clone: true}))
	require.NoError(t, os.Chmod(image, 0o640))
	second := identify(Options{Clone: true})
	require.Equal(t, first.UUID, second.UUID)
	require.NotEqual(t, first.Generation, second.Generation)
	touch(t, Spec{Disk: openFile(t, image, false)})
	third := identify(Options{})
	require.NotEqual(t, first.UUID, third.UUID)
	require.Equal(t, third, identify(Options{Clone: true}))
	poke(t, image, 0)
	require.NotEqual(t, third.UUID, identify(Options{}).UUID, "by a sample")
}

// The copies of an image are in use as the disk that it was. If it is served live itself it is
// another disk, so that none of them passes for its owner and ends its service; it is the image
// again if nothing was written and no destination was met (fault A5).
func TestACopyOfAGoldenImageIsNotTheOwnerOfTheImageInUse(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image.raw")
	require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	identify := func(o Options, use func(l *Ledger, d Spec)) (id migrate.Identity) {
		opened(t, image, "", func(d Spec) {
			l := mustOpen(t, []Spec{d}, o)
			id = l.Identity(0)
			if use != nil {
				use(l, d)
			}
			require.NoError(t, l.Close())
		})
		return id
	}
	golden := identify(Options{Clone: true}, nil)
	unused := identify(Options{Live: true}, nil)
	require.NotEqual(t, golden.UUID, unused.UUID)
	require.Equal(t, golden, identify(Options{Clone: true}, nil), "nothing was written")
	met := identify(Options{Live: true}, func(l *Ledger, d Spec) {
		require.NoError(t, l.Confirm(d.Name, migrate.Owner{Device: migrate.Device{7}, Epoch: 9}))
	})
	require.NotEqual(t, golden.UUID, met.UUID)
	again := identify(Options{Live: true}, func(*Ledger, Spec) { poke(t, image, 0) })
	require.Equal(t, met.UUID, again.UUID, "a destination has it by that name")
	require.Equal(t, met.UUID, identify(Options{Live: true}, nil).UUID)
	require.NotEqual(t, golden.UUID, identify(Options{Clone: true}, nil).UUID)
}
