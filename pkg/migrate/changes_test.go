package migrate

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// left is memory that lives as long as the boot; a process that is killed does not
// close it.
type left struct {
	b     []byte
	valid bool
}

type mapped struct {
	*left
	kept bool
}

func (l *left) open(size int64) (bootMemory, error) {
	kept := l.valid && int64(len(l.b)) == size
	if !kept {
		*l = left{b: make([]byte, size)}
	}
	return &mapped{l, kept}, nil
}

func (m *mapped) Kept() bool               { return m.kept }
func (m *mapped) Bytes() []byte            { return m.b }
func (m *mapped) Reserve(_, _ int64) error { return nil }
func (m *mapped) Validate()                { m.valid = true }
func (m *mapped) Forget() error            { m.valid = false; return nil }
func (m *mapped) Close() error             { return nil }

var changesOf = ChangesOptions{Disk: Identity{UUID: [16]byte{1}, Generation: 7}, Size: 1<<20 - 100, BlockSize: 4096}

// begun is a Tracker as a process makes it, on a disk of its own.
func begun(t *testing.T, l *left, o ChangesOptions) (*Tracker, *Changes) {
	t.Helper()
	c, err := openChanges(o, l.open)
	require.NoError(t, err)
	tracker, err := NewTracker(sources.NewMemoryStorage(int(o.Size)), TrackerOptions{Changes: c})
	require.NoError(t, err)
	return tracker, c
}

func geometryOf(t *testing.T, o ChangesOptions) geometry {
	t.Helper()
	geo, err := newGeometry(o.Size, o.BlockSize)
	require.NoError(t, err)
	return geo
}

// What was written since it was sent, and in which state the destination was, is known
// to the process after a kill, and what that one adds to the one after it. (trap I9)
func TestALiveSourceKnowsItsChangesAfterAKill(t *testing.T) {
	l, geo := new(left), geometryOf(t, changesOf)
	tracker, c := begun(t, l, changesOf)
	require.False(t, c.Kept())
	_, err := tracker.WriteAt(make([]byte, 10), 5*4096)
	require.NoError(t, err)
	d := tracker.track(geo)
	require.Zero(t, d.count.Load(), "what was written before anything was sent is not dirty")
	_, err = tracker.WriteAt(make([]byte, 4097), 3*4096)
	require.NoError(t, err)
	require.NoError(t, tracker.ZeroAtContext(t.Context(), 1<<20-4096, 4096-100, true))
	tracker.record.confirm(Owner{Device: Device{9}, Epoch: 11})
	require.NoError(t, tracker.record.step(func() error { return nil }))
	require.Error(t, tracker.record.step(func() error { return errors.New("no answer") }))
	d.clear(3)
	want := LastPeer{Owner: Owner{Device: Device{9}, Epoch: 11, Steps: 1}, Met: true, Pending: 1}

	for range 3 {
		tracker, c = begun(t, l, changesOf)
		require.True(t, c.Kept() && tracker.goesOn())
		got, owned := tracker.record.get()
		require.Equal(t, want, got)
		require.False(t, owned)
		// It is remembered from the first write on.
		_, err = tracker.WriteAt(make([]byte, 1), 100*4096)
		require.NoError(t, err)
		d = tracker.track(geo)
		var dirty []int64
		d.dirty.each(func(i int64) { dirty = append(dirty, i) })
		require.Equal(t, []int64{4, 100, 255}, dirty)
		require.EqualValues(t, 3, d.count.Load())
	}
}

// After an end in order it outlives the boot as well, and what is damaged, or of another
// disk or other contents, is refused and changes nothing. (trap I9)
func TestALiveSourceKnowsItsChangesAfterAnotherBoot(t *testing.T) {
	tracker, c := begun(t, new(left), changesOf)
	require.Nil(t, c.Saved(), "nothing was sent")
	tracker.track(geometryOf(t, changesOf))
	_, err := tracker.WriteAt(make([]byte, 4097), 3*4096)
	require.NoError(t, err)
	tracker.record.confirm(Owner{Device: Device{9}, Epoch: 11})
	want, _ := tracker.record.get()
	saved := c.Saved()

	l := new(left)
	c, err = openChanges(changesOf, l.open)
	require.NoError(t, err)
	for at := 0; at < len(saved); at += 7 {
		b := append([]byte(nil), saved...)
		b[at] ^= 0x10
		require.Error(t, c.Restore(b), at)
	}
	require.Error(t, c.Restore(saved[:len(saved)-1]))
	require.False(t, c.Kept())
	require.Nil(t, c.Saved())
	for _, other := range []ChangesOptions{
		{Disk: Identity{UUID: [16]byte{2}, Generation: 7}, Size: changesOf.Size, BlockSize: 4096},
		{Disk: Identity{UUID: [16]byte{1}, Generation: 8}, Size: changesOf.Size, BlockSize: 4096},
		{Disk: changesOf.Disk, Size: changesOf.Size - 1, BlockSize: 4096},
	} {
		o, err := openChanges(other, new(left).open)
		require.NoError(t, err)
		require.Error(t, o.Restore(saved))
	}
	require.NoError(t, c.Restore(saved))
	for range 2 { // and a kill after that
		require.True(t, c.Kept())
		tracker, err = NewTracker(sources.NewMemoryStorage(int(changesOf.Size)), TrackerOptions{Changes: c})
		require.NoError(t, err)
		got, _ := tracker.record.get()
		require.Equal(t, want, got)
		d := tracker.track(geometryOf(t, changesOf))
		require.EqualValues(t, 2, d.count.Load())
		require.True(t, d.get(3) && d.get(4))
		c, err = openChanges(changesOf, l.open)
		require.NoError(t, err)
	}
	tracker.give(Device{9})
	require.Nil(t, tracker.changes.Saved(), "the disk was handed off")
}

// Changes of other contents, in other blocks, or of a disk that nobody had begun to
// send, are not those of this disk; and what was handed off has none. (traps I4, I9)
func TestChangesOfAnotherTimeDoNotCount(t *testing.T) {
	other := map[string]func(o *ChangesOptions){
		"generation": func(o *ChangesOptions) { o.Disk.Generation++ },
		"none":       func(o *ChangesOptions) { o.Disk.Generation = 0 },
		"size":       func(o *ChangesOptions) { o.Size-- },
		"block size": func(o *ChangesOptions) { o.BlockSize *= 2 },
	}
	for name, change := range other {
		l := new(left)
		tracker, _ := begun(t, l, changesOf)
		tracker.track(geometryOf(t, changesOf)).markAll()
		o := changesOf
		change(&o)
		tracker, c := begun(t, l, o)
		require.False(t, c.Kept() || tracker.goesOn(), name)
		require.Zero(t, tracker.track(geometryOf(t, o)).count.Load(), name)
	}
	l := new(left)
	tracker, _ := begun(t, l, changesOf)
	_, err := tracker.WriteAt(make([]byte, 10), 0)
	require.NoError(t, err)
	tracker, c := begun(t, l, changesOf)
	require.False(t, c.Kept(), "nothing was sent")
	tracker.track(geometryOf(t, changesOf))
	tracker.give(Device{9})
	_, c = begun(t, l, changesOf)
	require.False(t, c.Kept(), "the disk was handed off")
}

// A source that goes on with other blocks than its Changes have takes all for dirty.
func TestChangesInOtherBlocksMakeAllDirty(t *testing.T) {
	l := new(left)
	tracker, _ := begun(t, l, changesOf)
	tracker.track(geometryOf(t, changesOf))
	tracker, _ = begun(t, l, changesOf)
	o := changesOf
	o.BlockSize *= 2
	geo := geometryOf(t, o)
	require.Equal(t, geo.blocks, tracker.track(geo).count.Load())
	_, c := begun(t, l, changesOf)
	require.False(t, c.Kept())
}

// slowZeroer is a disk whose zeroes take their time.
type slowZeroer struct {
	*sources.MemoryStorage
	size  uint64
	zeros int
	hook  func()
}

func (z *slowZeroer) Size() uint64 { return z.size }

func (z *slowZeroer) ZeroAt(_, _ int64, _ bool) error {
	z.zeros++
	z.hook()
	return nil
}

func (z *slowZeroer) TrimAt(off, length int64) error { return z.ZeroAt(off, length, true) }

// Gigabytes of zeroes, or of what is trimmed, end when their client has gone. (fault F15)
func TestLongZeroesOfASourceCanBeInterrupted(t *testing.T) {
	gone := errors.New("the client has gone")
	for _, trim := range []bool{true, false} {
		ctx, cancel := context.WithCancelCause(t.Context())
		disk := &slowZeroer{MemoryStorage: sources.NewMemoryStorage(0), size: 10 * zeroChunk}
		disk.hook = func() {
			if disk.zeros == 2 {
				cancel(gone)
			}
		}
		tracker, err := NewTracker(disk, TrackerOptions{})
		require.NoError(t, err)
		if trim {
			err = tracker.TrimAtContext(ctx, 0, int64(disk.size))
		} else {
			err = tracker.ZeroAtContext(ctx, 0, int64(disk.size), true)
		}
		require.ErrorIs(t, err, gone)
		require.Equal(t, 2, disk.zeros)
		cancel(nil)
	}
}
