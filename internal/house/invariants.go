package house

import (
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
)

// invariantsFile holds every claim that a code such as M12 stands for: a table
// row a code, with the tests that show it.
const invariantsFile = "docs/INVARIANTS.md"

var (
	rowPattern   = regexp.MustCompile(`(?m)^\| ([A-Z][0-9]+) \| (.+?) \| (.*?) \|$`)
	testPattern  = regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	codePattern  = regexp.MustCompile(`\b(?:trap|traps|fault|faults) ([A-Z][0-9]+(?:(?:, | and )[A-Z][0-9]+)*)`)
	oneCode      = regexp.MustCompile(`[A-Z][0-9]+`)
	testFunction = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9_]+)\(`)
)

// CheckInvariants holds docs/INVARIANTS.md against the Go files of a module: each
// code that a file mentions must have a row, each row must name a test, and each
// test that is named must exist. It returns what is wrong, a line each.
func CheckInvariants(root fs.FS) ([]string, error) {
	text, err := fs.ReadFile(root, invariantsFile)
	if err != nil {
		return nil, err
	}
	tests, used, err := testsAndCodes(root)
	if err != nil {
		return nil, err
	}
	var wrong []string
	rows := make(map[string]bool)
	for _, row := range rowPattern.FindAllStringSubmatch(string(text), -1) {
		code := row[1]
		if rows[code] {
			wrong = append(wrong, fmt.Sprintf("%s: %s has two rows", invariantsFile, code))
		}
		rows[code] = true
		named := testPattern.FindAllStringSubmatch(row[3], -1)
		if len(named) == 0 {
			wrong = append(wrong, fmt.Sprintf("%s: %s names no test", invariantsFile, code))
		}
		for _, t := range named {
			if !tests[t[1]] {
				wrong = append(wrong, fmt.Sprintf("%s: %s names %s, which does not exist", invariantsFile, code, t[1]))
			}
		}
	}
	for _, code := range slices.Sorted(maps.Keys(used)) {
		if !rows[code] {
			wrong = append(wrong, fmt.Sprintf("%s: %s has no row in %s", used[code], code, invariantsFile))
		}
	}
	return wrong, nil
}

// testsAndCodes returns the names of all tests, and for each code that a Go file
// mentions one file that does.
func testsAndCodes(root fs.FS) (tests map[string]bool, codes map[string]string, err error) {
	tests, codes = make(map[string]bool), make(map[string]string)
	err = eachGoFile(root, func(name string, source []byte) error {
		for _, m := range testFunction.FindAllSubmatch(source, -1) {
			tests[string(m[1])] = true
		}
		if path.Dir(name) == "internal/house" {
			return nil // its own tests mention codes that stand for no claim
		}
		for _, m := range codePattern.FindAllSubmatch(source, -1) {
			for _, code := range oneCode.FindAllString(string(m[1]), -1) {
				codes[code] = name
			}
		}
		return nil
	})
	return tests, codes, err
}
