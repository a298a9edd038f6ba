package lives

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// snap: snap HOST FILE ID
func (r *run) snap(w []string) (bool, error) {
	h := r.host(w[0])
	if h.file(w[1]) == nil {
		return false, nil
	}
	return true, r.stopped(h, func() error { return h.snapshot(w[1], w[2]) })
}

// restore: restore HOST ID PARTS NAME [inplace] [plain]: parts are of d, m and s;
// plain is without extended attributes.
func (r *run) restore(w []string) (bool, error) {
	h := r.host(w[0])
	s := h.snaps[w[1]]
	if s == nil {
		return false, nil
	}
	which, n := w[2], h.real(w[3])
	inPlace, withAttrs := slices.Contains(w, "inplace"), !slices.Contains(w, "plain")
	was := h.files[n]
	if was != nil && r.inUse(was) || strings.Contains(which, "m") && !strings.Contains(s.parts, "m") || h.stuck() {
		return false, nil
	}
	if was == nil && (!strings.Contains(which, "d") || exists(h.path(n))) || s.disk != diskName(n) {
		return false, nil
	}
	r.weird = true
	if was != nil {
		r.leave(was)
		r.doubt(was)
		sameSave, err := s.sameSave(h, n)
		if err != nil {
			return false, err
		}
		r.over = r.over || s.unseen(was, which, inPlace, withAttrs, sameSave)
	}
	if err := s.put(h, n, which, inPlace && was != nil, withAttrs); err != nil {
		return true, err
	}
	if strings.Contains(which, "s") {
		h.noted[n] = s.noted[1]
	}
	if !strings.Contains(which, "d") {
		return true, r.onlyBeside(h, s, n)
	}
	f := &file{host: h, line: s.of, whole: s.whole, dest: s.file.dest, local: map[int]bool{}}
	switch {
	case withAttrs:
		f.noted = s.noted[0]
	case inPlace && was != nil:
		f.noted = was.noted
	}
	f.loose = was == nil && !strings.Contains(which, "m")
	if inPlace && was != nil { // all of its names
		for _, other := range h.namesOf(was) {
			h.files[other] = f
		}
	}
	h.files[n] = f
	rolledBack := was != nil && was.line == s.of && was.line != nil && (was.line.owner == was || was.earlier != nil)
	switch l := s.of; {
	case !s.owner && s.ended && s.whole && rolledBack && !strings.Contains(which, "s"):
		// It is as it was when it was handed off, and the state file knows that it
		// was taken back since.
		have, err := h.contents(n)
		if err != nil {
			return true, err
		}
		*l = *newLine(l.id, have)
		l.owner = f
	case !s.owner:
		if rolledBack && strings.Contains(which, "m") {
			f.earlier = s.maybe
		}
	case was == nil || was != s.file && was.line != s.of:
		// A copy elsewhere, or over another disk: one of its own if it is whole.
		if s.whole && !h.knows(n) {
			r.fork(f, s.line)
		}
	case rolledBack && (s.whole || strings.Contains(which, "m")):
		// The owner was rolled back: that is the disk from now on.
		l.rollBack(s.line, f)
	case rolledBack:
	case s.whole && !h.knows(n):
		// It was handed off since, which nothing here knows any more.
		r.fork(f, s.line)
	}
	return true, nil
}

// unseen reports whether nothing can tell that a part of a destination's disk was
// put back: a map or a disk of the life that was killed last, a disk that lies in the
// same file with the same attributes, or a complete one that others may write. Nor if
// both were put back after a kill, and the map had not been saved since: then what the
// process has left for as long as the boot counts for it, with what came later.
func (s *snap) unseen(was *file, which string, inPlace, withAttrs, sameSave bool) bool {
	disk, itsMap := strings.Contains(which, "d"), strings.Contains(which, "m")
	if disk && itsMap {
		return was.dest && s.life == was.life && inPlace && !was.clean && sameSave
	}
	same := s.life == was.life || disk && inPlace && !withAttrs
	return was.dest && disk != itsMap && same && (!disk || inPlace) && (!was.clean || was.whole)
}

// sameSave reports whether the map at a name may be of the same save as that of the
// snapshot: one of the two copies of the header is the same.
func (s *snap) sameSave(h *host, name string) (bool, error) {
	was, err := os.ReadFile(filepath.Join(s.dir, "m"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	now, nowErr := os.ReadFile(h.path(name) + mapSuffix)
	if errors.Is(nowErr, fs.ErrNotExist) {
		return false, err
	}
	const slot = 4096 // bytes of a copy of the header
	for at := 0; at < 2*slot && at+slot <= min(len(was), len(now)); at += slot {
		if bytes.Equal(was[at:at+slot], now[at:at+slot]) {
			return true, errors.Join(err, nowErr)
		}
	}
	return false, errors.Join(err, nowErr)
}

// fork lets a file live on beside the owner, as it was at some time.
func (r *run) fork(f *file, was *line) {
	f.line = was.clone(r.nextLine())
	f.line.owner, f.line.rolledBack = f, true
}

// onlyBeside is a restore of what lies beside a disk.
func (r *run) onlyBeside(h *host, s *snap, n string) error {
	f := h.files[n]
	if f == nil || f.line == nil || f.line.owner == f || h.knows(n) || !s.owner || !f.whole {
		return nil
	}
	have, err := h.contents(n)
	if err != nil {
		return err
	}
	r.fork(f, newLine(0, have))
	return nil
}

// tamper: tamper HOST FILE SEED [touch]: another program writes to a disk; touch
// puts its time of modification back.
func (r *run) tamper(w []string) (bool, error) {
	h := r.host(w[0])
	f := h.file(w[1])
	if f == nil || f.line == nil || r.inUse(f, frozen) || h.stuck() || !f.whole {
		return false, nil
	}
	r.weird = true
	r.leave(f)
	r.doubt(f)
	seed, _ := strconv.ParseUint(w[2], 10, 64)
	rnd := rand.New(rand.NewPCG(seed, 3))
	path := h.path(w[1])
	info, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	d, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return false, err
	}
	l := f.line
	for range 3 {
		s := rnd.IntN(l.checked())
		t := r.nextToken()
		var b [sector]byte
		fill(b[:], s, t)
		_, werr := d.WriteAt(b[:], int64(s)*sector)
		err = errors.Join(err, werr)
		if l.owner == f && !r.inUse(f) {
			delete(l.open, s)
			delete(l.unflushed, s)
			l.cur[s] = t
		} else if o := l.owner; o != nil && o != f && !r.inUse(f) && !o.local[s] {
			// What the owner has not got yet may be taken as it is now, after a comparison
			// of what it has got.
			l.failed(s, t)
		}
	}
	if l.owner != f || r.inUse(f) {
		if l.owner == f && !r.received(f) {
			l.owner.whole = true
			have, rerr := h.contents(w[1])
			l.cur, err = have, errors.Join(err, rerr)
		} else {
			l.tampered = true
		}
	}
	err = errors.Join(err, d.Close())
	if slices.Contains(w, "touch") {
		err = errors.Join(err, os.Chtimes(path, time.Time{}, info.ModTime()))
	}
	return true, err
}

// replace: replace HOST FILE SEED: another disk takes the name of one.
func (r *run) replace(w []string) (bool, error) {
	h := r.host(w[0])
	n := h.real(w[1])
	was := h.files[n]
	if was == nil || r.inUse(was) || h.stuck() {
		return false, nil
	}
	r.weird = true
	r.leave(was)
	contents := make([]token, r.sizes[diskName(n)])
	b := make([]byte, len(contents)*sector)
	for s := range contents {
		contents[s] = r.nextToken()
		fill(b[s*sector:(s+1)*sector], s, contents[s])
	}
	f := &file{host: h, line: newLine(r.nextLine(), contents), whole: true, local: map[int]bool{}}
	f.line.owner = f
	h.files[n] = f
	return true, errors.Join(os.Remove(h.path(n)), os.WriteFile(h.path(n), b, 0o600))
}

// received reports whether another file has something of a file's line, and not from
// the time before that was complete.
func (r *run) received(f *file) bool {
	for _, h := range r.hosts {
		for _, o := range h.files {
			if o != f && o.line == f.line && !o.gone {
				return true
			}
		}
	}
	return false
}

// move: mv HOST FILE NEW [alone]: with what lies beside it, or alone
func (r *run) move(w []string) (bool, error) {
	h := r.host(w[0])
	f := h.files[w[1]]
	if f == nil || h.takes(w[2]) || r.inUse(f) || diskName(w[1]) != diskName(w[2]) || h.ro {
		return false, nil
	}
	r.weird = true
	for _, part := range parts {
		if part.letter != "d" && slices.Contains(w, "alone") {
			continue
		}
		err := os.Rename(h.path(w[1])+part.suffix, h.path(w[2])+part.suffix)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return true, err
		}
		if part.letter == "s" && err == nil {
			h.noted[w[2]], h.noted[w[1]] = h.noted[w[1]], false
		}
	}
	h.files[w[2]] = f
	delete(h.files, w[1])
	return true, nil
}

// hardLink: ln HOST FILE NEW
func (r *run) hardLink(w []string) (bool, error) {
	h := r.host(w[0])
	f := h.files[w[1]]
	if f == nil || h.takes(w[2]) || diskName(w[1]) != diskName(w[2]) || h.stuck() {
		return false, nil
	}
	r.weird = true // its state file has one of the names
	if err := os.Link(h.path(w[1]), h.path(w[2])); err != nil {
		return true, err
	}
	h.files[w[2]] = f
	return true, nil
}

// symLink: sym HOST FILE NEW
func (r *run) symLink(w []string) (bool, error) {
	h := r.host(w[0])
	if h.files[w[1]] == nil || h.takes(w[2]) || diskName(w[1]) != diskName(w[2]) || h.stuck() {
		return false, nil
	}
	if err := os.Symlink(h.path(w[1]), h.path(w[2])); err != nil {
		return true, err
	}
	h.links[w[2]] = w[1]
	return true, nil
}

// inspect: inspect HOST FILE
func (r *run) inspect(w []string) (bool, error) {
	h := r.host(w[0])
	f := h.file(w[1])
	if f == nil || f.line == nil {
		return false, nil
	}
	out, err := exec.Command(r.bin, "inspect", "--json", h.path(w[1])).Output()
	if err != nil {
		return true, nil // nothing was claimed
	}
	var report struct{ Safe bool }
	if err := json.Unmarshal(out, &report); err != nil {
		return true, err
	}
	if !report.Safe {
		return true, nil
	}
	if diff := r.holds(f); diff != "" {
		return true, violatedf("false-success", "inspect says that %s of %s is safe, but it is not line %d: %s", w[1], h.name, f.line.id, diff)
	}
	return true, nil
}
