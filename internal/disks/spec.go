// Package disks knows which disks a command line means, and opens those of
// either side so that nothing is overwritten by accident.
package disks

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxName     = 4096 // bytes in the name of an NBD export
	maxFileName = 255  // bytes in the name of a file
)

// Spec is one --disk of the command line.
type Spec struct {
	Name  string // the disk's name on the wire and as an NBD export
	Named bool   // the name was given; otherwise it is the file's
	Path  string
	Map   string // where its map lies; empty: beside it
	State string // where the state file of a source's disk lies; empty: beside it
}

// ParseSpec reads [NAME=]PATH. What comes before the first "=" is a name
// unless a slash comes before it.
func ParseSpec(s string) (Spec, error) {
	name, path, found := strings.Cut(s, "=")
	if !found || strings.Contains(name, "/") {
		if s == "" {
			return Spec{}, errors.New("the path is empty: want [NAME=]PATH")
		}
		name := defaultName(s)
		if err := CheckName(name); err != nil {
			return Spec{}, fmt.Errorf("%w: give it another one, as in --disk NAME=%s", err, s)
		}
		return Spec{Name: name, Path: s}, nil
	}
	if name == "" || path == "" {
		return Spec{}, fmt.Errorf("%q: want [NAME=]PATH, with something on both sides of the =", s)
	}
	if err := CheckName(name); err != nil {
		return Spec{}, err
	}
	return Spec{Name: name, Named: true, Path: path}, nil
}

// ParseSpecs reads several --disk flags and refuses two that are the same.
func ParseSpecs(flags []string) ([]Spec, error) {
	var specs []Spec
	for _, f := range flags {
		s, err := ParseSpec(f)
		if err != nil {
			return nil, err
		}
		for _, other := range specs {
			if filepath.Clean(other.Path) == filepath.Clean(s.Path) {
				return nil, fmt.Errorf("%s is given twice", s.Path)
			}
			if other.Name == s.Name {
				return nil, fmt.Errorf("%s and %s are both called %q: name one, as in --disk NAME=%s", other.Path, s.Path, s.Name, s.Path)
			}
		}
		specs = append(specs, s)
	}
	return specs, nil
}

// PlaceMaps sets where the maps of the disks lie, by flags of [NAME=]PATH. NAME
// is that of a disk; with only one disk it can be left out.
func PlaceMaps(specs []Spec, flags []string) error {
	return place(specs, flags, "map", func(s *Spec) *string { return &s.Map })
}

// PlaceStates sets where the state files of a source's disks lie, as PlaceMaps.
func PlaceStates(specs []Spec, flags []string) error {
	return place(specs, flags, "state file", func(s *Spec) *string { return &s.State })
}

func place(specs []Spec, flags []string, what string, where func(*Spec) *string) error {
	for _, f := range flags {
		m, err := ParseSpec(f)
		if err != nil {
			return err
		}
		at := slices.IndexFunc(specs, func(s Spec) bool { return s.Name == m.Name })
		switch {
		case !m.Named && len(specs) == 1:
			at = 0
		case !m.Named:
			return fmt.Errorf("%s: there are %d disks: say whose %s it is, as in NAME=%s", m.Path, len(specs), what, m.Path)
		case at < 0:
			return fmt.Errorf("%s: no --disk is called %q", m.Path, m.Name)
		}
		if other := *where(&specs[at]); other != "" {
			return fmt.Errorf("%s and %s are both for the disk %q", other, m.Path, specs[at].Name)
		}
		for i := range specs {
			s, other := &specs[i], *where(&specs[i])
			switch clean := filepath.Clean(m.Path); {
			case filepath.Clean(s.Path) == clean:
				return fmt.Errorf("%s is a disk: want another file", m.Path)
			case other != "" && filepath.Clean(other) == clean:
				return fmt.Errorf("%s is given twice", m.Path)
			}
		}
		*where(&specs[at]) = m.Path
	}
	return nil
}

// defaultName is the file's name without its ending.
func defaultName(path string) string {
	base := filepath.Base(path)
	if name := strings.TrimSuffix(base, filepath.Ext(base)); name != "" {
		return name
	}
	return base
}

// CheckName says why a name cannot be that of an NBD export. It is for names
// that come over the wire as well as for those of the command line.
func CheckName(name string) error {
	switch {
	case len(name) > maxName:
		return fmt.Errorf("the disk's name has %d bytes, more than the %d that NBD allows", len(name), maxName)
	case !utf8.ValidString(name):
		return fmt.Errorf("the disk's name %q is not valid UTF-8", name)
	}
	for _, r := range name {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("the disk's name %q holds %q, which cannot be printed", name, r)
		}
	}
	return nil
}

// CheckFileName says why a name that a peer sent is not safe as the name of a
// file: only letters, digits, dot, dash and underscore are, and no dot first.
func CheckFileName(name string) error {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	switch {
	case name == "":
		return errors.New("the disk has no name")
	case len(name) > maxFileName:
		return fmt.Errorf("the disk's name has %d bytes, more than the %d of a file's", len(name), maxFileName)
	case strings.HasPrefix(name, "."), strings.IndexFunc(name, func(r rune) bool { return !strings.ContainsRune(allowed, r) }) >= 0:
		return fmt.Errorf("the disk's name %.100q is not taken as a file's: want letters, digits, '.', '_' and '-', and no dot first", name)
	}
	return nil
}
