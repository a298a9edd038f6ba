package lives

import (
	"encoding/binary"
	"fmt"
	"slices"
)

const (
	sector    = 512  // bytes: what a disk keeps all or nothing of
	blockSize = 4096 // bytes: the unit of the migration
	perBlock  = blockSize / sector
)

// token names the content of a sector: 0 is all zeroes, torn none that was
// ever written.
type token uint64

const torn = ^token(0)

// fill lays the content of sector s that t names into p.
func fill(p []byte, s int, t token) {
	clear(p)
	if t == 0 {
		return
	}
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(t)+uint64(i)<<40+uint64(s)<<48)
	}
}

// name returns the token of the content of sector s.
func name(p []byte, s int) token {
	t := token(binary.LittleEndian.Uint64(p) - uint64(s)<<48)
	if binary.LittleEndian.Uint64(p) == 0 {
		t = 0
	}
	var want [sector]byte
	fill(want[:len(p)], s, t)
	if string(want[:len(p)]) != string(p) {
		return torn
	}
	return t
}

// names returns the tokens of consecutive sectors from the first on.
func names(p []byte, first int) []token {
	all := make([]token, 0, len(p)/sector)
	for i := 0; i+sector <= len(p); i += sector {
		all = append(all, name(p[i:i+sector], first+i/sector))
	}
	return all
}

// line is one history of the contents of a disk: each disk begins as one, and
// each copy that lives on beside the owner begins another.
type line struct {
	id  int
	cur []token // what a read must return
	// open is what else a sector may hold: its write was not answered, or a
	// power cut came before the flush.
	open map[int][]token
	// unflushed is what a sector held at the last flush and since, where that
	// is not cur.
	unflushed map[int][]token
	// owner is the file whose process answers writes, or did last.
	owner *file
	// offered reports that a source has run on the owner since it became that:
	// only then may another file become the owner.
	offered bool
	// rolledBack tells that a host was rolled back to before it gave the disk away:
	// it stops when it meets the owner.
	rolledBack bool
	// seen tells whether a process has been seen to answer writes.
	seen bool
	// sure tells that the owner is known: nothing has happened since it was seen
	// that may have made another one of which nothing was seen.
	sure bool
	// tampered tells that somebody else has written to the disk while a
	// destination had it: reads of missing blocks may see that.
	tampered bool
}

func (l *line) clone(id int) *line {
	c := &line{id: id, cur: slices.Clone(l.cur), open: map[int][]token{}, unflushed: map[int][]token{}, tampered: l.tampered}
	for s, v := range l.open {
		c.open[s] = slices.Clone(v)
	}
	for s, v := range l.unflushed {
		c.unflushed[s] = slices.Clone(v)
	}
	return c
}

// rollBack makes l what it was at an earlier time, at the file that is its owner from
// now on.
func (l *line) rollBack(to *line, owner *file) {
	was := to.clone(l.id)
	l.cur, l.open, l.unflushed, l.owner, l.offered = was.cur, was.open, was.unflushed, owner, false
}

// goesOn lets a line go on at a file that took the place of its owner, if that was
// perhaps the owner of before; it reports whether it was.
func (l *line) goesOn(f *file) bool {
	if f.earlier == nil || l.owner == nil || len(l.owner.host.namesOf(l.owner)) > 0 {
		return false
	}
	l.rollBack(f.earlier, f)
	f.earlier, f.local, f.gone = nil, map[int]bool{}, false
	return true
}

func newLine(id int, contents []token) *line {
	return &line{id: id, cur: contents, open: map[int][]token{}, unflushed: map[int][]token{}}
}

// checked is the number of sectors that are checked: the last block is where
// probes are written, whose order is not known.
func (l *line) checked() int { return (len(l.cur) - 1) / perBlock * perBlock }

// answered notes a write of t to sector s that was answered.
func (l *line) answered(s int, t token) {
	if len(l.open[s]) > 0 {
		l.unflushed[s] = append(l.unflushed[s], l.open[s]...)
		delete(l.open, s)
	}
	l.unflushed[s] = append(l.unflushed[s], l.cur[s])
	l.cur[s] = t
}

// failed notes a write of t to sector s that was answered with an error, or not
// at all: it may be there, whole, at any later time.
func (l *line) failed(s int, t token) { l.open[s] = append(l.open[s], t) }

// flushed notes a flush that was answered; nothing was written while it ran.
func (l *line) flushed() { clear(l.unflushed) }

// crashed notes that what was not flushed may be gone, also as if it had never
// arrived.
func (f *file) crashed() {
	for s, v := range f.line.unflushed {
		f.line.open[s] = append(f.line.open[s], v...)
		delete(f.local, s)
	}
}

// may reports whether sector s may hold t. With settle, t is what it holds from
// now on.
func (l *line) may(s int, t token, settle bool) bool {
	if s >= l.checked() {
		return true
	}
	if t != l.cur[s] && !slices.Contains(l.open[s], t) {
		return false
	}
	if settle && len(l.open[s]) > 0 {
		if t != l.cur[s] {
			l.unflushed[s] = append(l.unflushed[s], l.cur[s])
		}
		l.cur[s] = t
		l.unflushed[s] = append(l.unflushed[s], l.open[s]...)
		delete(l.open, s)
	}
	return true
}

// differs says where the contents of a whole disk are not those of the line;
// empty if nowhere.
func (l *line) differs(contents []token) string {
	if len(contents) != len(l.cur) {
		return fmt.Sprintf("it has %d sectors, want %d", len(contents), len(l.cur))
	}
	n, first := 0, -1
	for s, t := range contents {
		if !l.may(s, t, false) {
			if n++; first < 0 {
				first = s
			}
		}
	}
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%d of %d sectors differ, the first is %d: it holds %s, want %s", n, len(l.cur), first, contents[first], l.cur[first])
}

func (t token) String() string {
	switch t {
	case 0:
		return "zeroes"
	case torn:
		return "what was never written"
	}
	return fmt.Sprintf("#%d", uint64(t))
}

// file is a disk's file on a host, by whatever names.
type file struct {
	host *host
	line *line // nil: nothing was received yet
	// whole tells that it holds all of its line: it began so, or has become
	// complete.
	whole bool
	// noted tells that the file itself bears the note that it was handed off.
	noted bool
	// local are the sectors that were written here since it is the owner.
	local map[int]bool
	// gone tells that a source of it has ended with 0, rightly.
	gone bool
	// earlier is the line that goes on here if it turns out that the owner was rolled
	// back, and not a destination of before the handoff.
	earlier *line
	// loose tells that it is a copy by another name without what lay beside it: a
	// source serves it as it is.
	loose bool
	// dest tells that a destination of it was ready.
	dest bool
	// life is another number after each start and each clean end of a destination:
	// its map and the disk can only be told from those of another life. clean tells
	// that the last one has ended in order.
	life  int
	clean bool
}
