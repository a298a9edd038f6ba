package lazy

import (
	"errors"
	"path/filepath"
	"testing"
)

// In standby everything that is here may come to nothing: the source cannot tell
// any more what of it has changed. That is durable, and so is the new name.
func TestRestartForgetsDurably(t *testing.T) {
	path := filepath.Join(t.TempDir(), "map")
	id := Identity{Size: 8 * testBlock, BlockSize: testBlock, Source: UUID{1}, Generation: 4}
	m, err := CreateMap(path, id)
	if err != nil {
		t.Fatal(err)
	}
	disk := newMemDisk(id.Size)
	d, err := New(disk, Options{BlockSize: testBlock, Standby: true, Map: m})
	if err != nil {
		t.Fatal(err)
	}
	s := d.Attach(&asks{})
	mustWrite(t, s, 0, filled(1, 3*testBlock))
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := d.Restart(UUID{1}, 5); err != nil {
		t.Fatal(err)
	}
	if st := d.Stats(); st.Fetched != 0 || st.Live {
		t.Errorf("after Restart: %+v", st)
	}
	mustWrite(t, s, testBlock, filled(2, testBlock))
	mustGoLive(t, d)
	mustRead(t, d, testBlock, filled(2, testBlock))
	if err := d.Restart(UUID{1}, 6); !errors.Is(err, ErrLive) {
		t.Errorf("a live device restarts: %v", err)
	}
	if err := errors.Join(d.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	if err := d.Restart(UUID{1}, 6); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed device restarts: %v", err)
	}

	m, err = OpenMap(path, Identity{Source: UUID{1}, Generation: 5})
	if err != nil {
		t.Fatal(err)
	}
	d, err = New(disk, Options{Map: m})
	if err != nil {
		t.Fatal(err)
	}
	if st := d.Stats(); st.Fetched != 1 || !st.Live {
		t.Errorf("opened again: %+v", st)
	}
	if err := errors.Join(d.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
}
