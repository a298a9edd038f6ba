package identity

import "errors"

// oldState is a state file of version 1 or 2: there the generation was a
// counter, and the contents were known by samples.
type oldState struct {
	Version     int    `json:"version"`
	UUID        string `json:"uuid"`
	Generation  uint64 `json:"generation"`
	Fingerprint struct {
		Size    uint64 `json:"size"`
		Inode   uint64 `json:"inode"`
		ModTime int64  `json:"modtime"`
		Samples string `json:"samples"`
	} `json:"fingerprint"`
	Met     string `json:"met"`
	Open    bool   `json:"open"`
	Handoff *struct {
		ID    string   `json:"id"`
		Disks []string `json:"disks"`
		Owner string   `json:"owner"`
	} `json:"handoff"`
}

// decodeOld reads a state file of version 1 or 2. What it takes for a proof of
// the contents is none here, so that the disk will get a new generation, and the
// two ends compare. A handoff in it counts as ever.
func decodeOld(b []byte) (*state, error) {
	var o oldState
	if err := strictly(b, &o); err != nil {
		return nil, err
	}
	if o.Handoff != nil && o.Version == 1 {
		return nil, errors.New("version 1 knows no handoff")
	}
	s := &state{
		Version: o.Version, UUID: o.UUID, Generation: number(o.Generation),
		Live: o.Version == 2, Open: o.Open,
	}
	// The size and the inode tell whether it is the state file of this disk.
	s.Disk.Size, s.Disk.Inode = o.Fingerprint.Size, o.Fingerprint.Inode
	if o.Handoff == nil {
		return s, nil
	}
	s.Handoff = &handoff{ID: o.Handoff.ID, Owner: o.Handoff.Owner}
	for _, disk := range o.Handoff.Disks {
		s.Handoff.Disks = append(s.Handoff.Disks, member{UUID: disk})
	}
	return s, nil
}
