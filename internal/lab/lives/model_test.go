package lives

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestATokenNamesOneContentOfOneSector(t *testing.T) {
	var b [sector]byte
	for s := range 200 {
		for _, tok := range []token{0, 1, 77, 1 << 30} {
			fill(b[:], s, tok)
			require.Equal(t, tok, name(b[:], s))
			if tok != 0 {
				require.NotEqual(t, tok, name(b[:], s+1), "it lies where it does not belong")
				b[sector-1] ^= 1
				require.Equal(t, torn, name(b[:], s))
			}
		}
	}
}

func TestWhatMayBeReadOfASector(t *testing.T) {
	l := newLine(1, make([]token, 16))
	f := &file{line: l, local: map[int]bool{}}
	l.answered(0, 1)
	require.False(t, l.may(0, 0, false), "what was answered is there")
	f.crashed()
	require.True(t, l.may(0, 0, false), "it was not flushed")
	require.True(t, l.may(0, 1, false))
	require.False(t, l.may(0, 2, false))
	require.True(t, l.may(0, 0, true))
	require.False(t, l.may(0, 1, false), "what was read once stays")
	l.answered(0, 2)
	l.flushed()
	f.crashed()
	require.False(t, l.may(0, 0, false), "it was flushed")
	l.failed(0, 3)
	require.True(t, l.may(0, 2, false))
	require.True(t, l.may(0, 3, true))
	require.False(t, l.may(0, 2, false))
	require.True(t, l.may(15, 99, false), "of the last block nothing is known")
}

func TestOnlyAnOfferMakesAnotherOwner(t *testing.T) {
	a, b := &file{host: &host{}}, &file{host: &host{}}
	l := newLine(1, make([]token, 16))
	a.line, b.line, l.owner = l, l, a
	r := &run{}
	p := &process{label: "p"}
	require.Equal(t, "takeover", kindOf(r.owns(p, &export{file: b})))
	l.offered = true
	require.NoError(t, r.owns(p, &export{file: b}))
	require.Same(t, b, l.owner)
	require.Equal(t, "takeover", kindOf(r.owns(p, &export{file: a})))
}

func TestAnOwnerMayBePutBackToWhatItWasBeforeItWasSeen(t *testing.T) {
	h := &host{files: map[string]*file{}}
	a, b, c := &file{host: h}, &file{host: h}, &file{host: h}
	l := newLine(1, make([]token, 16))
	a.line, b.line, c.line, l.owner = l, l, l, b
	c.earlier = l.clone(1)
	l.answered(0, 7)
	h.files["d0"] = b
	require.False(t, l.goesOn(c), "the owner is there still")
	require.Same(t, b, l.owner)
	h.files["d0"] = c
	require.False(t, l.goesOn(a), "it did not take the place of the owner")
	require.True(t, l.goesOn(c))
	require.Same(t, c, l.owner)
	require.Zero(t, l.cur[0], "it is as it was")
	require.Equal(t, "takeover", kindOf((&run{}).owns(&process{}, &export{file: b})), "only one has its place")
}

func TestALiveSourceThatAnswersShowsThatNoneWasTheOwnerBefore(t *testing.T) {
	l := newLine(1, make([]token, 16))
	s, other := &snap{of: l, maybe: l.clone(1)}, &snap{of: newLine(2, nil), maybe: l.clone(2)}
	r := &run{hosts: [2]*host{{}, {snaps: map[string]*snap{"a": s, "b": other}}}}
	r.refute(l)
	require.Nil(t, s.maybe)
	require.NotNil(t, other.maybe)
}

func TestADestinationHasWhatItsSourceHadThatHasEnded(t *testing.T) {
	at, f := &port{}, &file{line: newLine(1, nil)}
	d := &process{kind: dest, port: at}
	was := &process{kind: golden, port: at, seen: true, met: map[*process]bool{d: true}, disks: []*export{{name: "d0", file: f}}}
	r := &run{procs: []*process{was, d}}
	s, of := r.sourceOf(d, "d0")
	require.Same(t, was, s)
	require.Same(t, f, of)
	_, of = r.sourceOf(&process{kind: dest, port: at}, "d0")
	require.Nil(t, of, "it came after the source had ended")
	g := &file{line: newLine(2, nil)}
	r.procs = append(r.procs, &process{kind: live, port: at, disks: []*export{{name: "d0", file: g}}})
	_, of = r.sourceOf(d, "d0")
	require.Same(t, g, of, "the one that runs goes first")
}

func TestASnapshotWithTheSameSaveOfTheMap(t *testing.T) {
	h := &host{dir: t.TempDir()}
	s := &snap{dir: t.TempDir()}
	put := func(path string, slots ...byte) {
		b := make([]byte, 0, 2*4096)
		for _, v := range slots {
			b = append(b, bytes.Repeat([]byte{v}, 4096)...)
		}
		require.NoError(t, os.WriteFile(path, b, 0o600))
	}
	same := func() bool {
		is, err := s.sameSave(h, "d0")
		require.NoError(t, err)
		return is
	}
	require.False(t, same(), "there is no map")
	put(filepath.Join(s.dir, "m"), 1, 1, 5)
	require.False(t, same(), "it is gone")
	put(h.path("d0")+mapSuffix, 1, 1, 6)
	require.True(t, same(), "only bits were written")
	put(h.path("d0")+mapSuffix, 2, 1)
	require.True(t, same(), "a save is under way")
	put(h.path("d0")+mapSuffix, 2, 2)
	require.False(t, same())
	file := &file{dest: true, life: 3}
	s.life = 3
	require.True(t, s.unseen(file, "dms", true, true, true))
	require.False(t, s.unseen(file, "dms", true, true, false), "the map was saved since")
	require.False(t, s.unseen(file, "dms", false, true, true), "it lies in another file")
	file.clean = true
	require.False(t, s.unseen(file, "dms", true, true, true), "the life after the snapshot has ended in order")
}

func TestANameIsTakenByWhatWasNotSeenYet(t *testing.T) {
	h := &host{dir: t.TempDir(), files: map[string]*file{"d0": {}}, links: map[string]string{"e0": "d0"}}
	require.True(t, h.takes("d0"))
	require.True(t, h.takes("e0"))
	require.False(t, h.takes("k0"))
	require.NoError(t, os.WriteFile(h.path("k0"), nil, 0o600))
	require.True(t, h.takes("k0"))
}
